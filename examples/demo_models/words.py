"""Vocabulary and sentences of the demo models' articles.

In a sentence, ``{name}`` stands for a fact of the article. A word list that a topic has under the
same name gives that fact's value; all other facts are drawn for every article alike.
"""

from __future__ import annotations

from dataclasses import dataclass


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split(";"))


FIRST_NAMES = _list(
    "Ada;Amos;Anna;Ben;Bruno;Carl;Cora;Dana;Dora;Edda;Elias;Emil;Erik;Etta;Felix;Flora;Frida;"
    "Greta;Gus;Hanna;Hugo;Ida;Igor;Ines;Ivan;Jana;Jonas;Julia;Karl;Kira;Lars;Lena;Leo;Lydia;"
    "Mara;Max;Mila;Nadia;Nils;Nora;Olga;Oscar;Otto;Paula;Petra;Ralf;Rosa;Ruth;Sara;Simon;Sven;"
    "Tara;Theo;Tilda;Tom;Una;Vera;Viktor;Wanda;Yara;Zora"
)
LAST_NAMES = _list(
    "Abel;Adler;Baker;Becker;Berg;Bloom;Brandt;Carver;Castle;Cole;Cooper;Dahl;Dorn;Egger;Falk;"
    "Farmer;Fisher;Frost;Garner;Graf;Hale;Harper;Hart;Hill;Holm;Huber;Jansen;Keller;Kern;Klein;"
    "Lang;Lind;Marsh;Mason;Meyer;Miller;Moss;Nagel;Novak;Olsen;Palmer;Parker;Pohl;Quinn;Reed;"
    "Rossi;Roth;Sand;Shaw;Stein;Stone;Thorn;Turner;Vogel;Wagner;Walter;Weber;Winter;Wolf;York;"
    "Zimmer"
)
PLACES = _list(
    "Alder Bay;Ashford;Birkwood;Blackmere;Brinton;Calder;Clayport;Corvale;Dunmore;Eastlake;"
    "Elmstead;Fairhill;Fenwick;Glenrock;Granby;Harwick;Hollow Bay;Ironbridge;Kelby;Kingsmill;"
    "Lakewood;Lindale;Marlow;Milford;Newhaven;North Bay;Oakfield;Oldport;Pinewood;Port Hale;"
    "Ravenhill;Redcliff;Riverton;Rosedale;Sandport;Silverlake;Southport;Stonebridge;Thornbury;"
    "Upper Moor;Valebrook;Westmere;Whitby;Winterfield;Woodham"
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = _list(
    "January;February;March;April;May;June;July;August;September;October;November;December"
)


@dataclass(frozen=True)
class Topic:
    """One kind of event.

    Attributes:
        words: values of the topic's own facts, by the fact's name.
        lead: wordings of the sentence that tells the event.
        details: for each further fact, wordings of its sentence; the last names the person.
        headline: the summary's first sentence, whose facts are all in the lead.
        detail: the summary's second sentence, whose facts are in the details.
        money: whether ``{amount}`` is a sum of money; otherwise a plain number.
    """

    words: dict[str, tuple[str, ...]]
    lead: tuple[str, ...]
    details: tuple[tuple[str, ...], ...]
    headline: str
    detail: str
    money: bool = True


TOPICS = (
    Topic(
        words={
            "thing": _list(
                "bridge;library;town hall;swimming pool;railway station;school;museum;mill;"
                "lighthouse;theater;market hall;hospital;ferry pier;post office"
            ),
            "cause": _list(
                "a fire;a flood;a storm;a burst pipe;a landslide;heavy snow;a power failure;"
                "a gas leak;an earthquake;a lightning strike"
            ),
        },
        lead=(
            "The {thing} in {place} had to close on {day} because of {cause}.",
            "Because of {cause}, {place} has closed its {thing} since {day}.",
            "On {day}, after {cause}, the town of {place} shut its {thing}.",
            "Nobody can enter the {thing} of {place}: {cause} forced it to close on {day}.",
        ),
        details=(
            (
                "Visitors have to wait until {month}.",
                "The doors should open again in {month}.",
                "It is expected to stay shut until {month}.",
            ),
            (
                "Engineer {person} thinks that repairs will cost {amount}.",
                "The damage comes to {amount}, said {person}, who leads the repairs.",
                "{person}, an engineer, put the price of the repairs at {amount}.",
                "To repair it, the town needs {amount}, according to engineer {person}.",
            ),
        ),
        headline="The {thing} in {place} closed on {day} after {cause}.",
        detail="{person} expects repairs to cost {amount} and last until {month}.",
    ),
    Topic(
        words={
            "office": _list("mayor;judge;treasurer;head of the school board;harbor master;sheriff"),
            "promise": _list(
                "lower taxes;cleaner streets;a new school;more buses;free museums;safer roads;"
                "cheaper homes;better schools;more trees;faster trains"
            ),
        },
        lead=(
            "The voters of {place} chose a new {office} on {day}.",
            "On {day} a new {office} was elected in {place}.",
            "{place} has a new {office} since the vote on {day}.",
        ),
        details=(
            (
                "The campaign was mostly about {promise}.",
                "Most voters wanted {promise}.",
                "People here were promised {promise}.",
            ),
            (
                "The runner-up, {rival}, did not want to comment.",
                "{rival} lost and wished the winner luck.",
                "For {rival} it was the second defeat.",
            ),
            (
                "{person} won with a lead of {amount} votes.",
                "The winner, {person}, was {amount} votes ahead.",
                "With {amount} votes more than anyone else, {person} takes the office.",
            ),
        ),
        headline="{place} elected a new {office} on {day}.",
        detail="{person} won by {amount} votes and promises {promise}.",
        money=False,
    ),
    Topic(
        words={
            "sport": _list("football;handball;hockey;volleyball;basketball;rugby;water polo"),
            "reason": _list(
                "rain;a broken lamp;fog;a late bus;a missing ball;strong wind;a thunderstorm"
            ),
        },
        lead=(
            "{place} beat {other} in the {sport} final on {day}.",
            "The {sport} final on {day} ended with a defeat of {other} by {place}.",
            "On {day} {other} lost the {sport} final against {place}.",
        ),
        details=(
            (
                "The game began late because of {reason}.",
                "Because of {reason}, the teams had to wait before the start.",
                "The start was delayed by {reason}.",
            ),
            (
                "Coach {rival} praised both teams.",
                "{rival}, the coach of the losing team, was disappointed.",
                "The losing side missed its captain, {rival}.",
            ),
            (
                "The decisive points came from {person}, in front of {amount} people.",
                "{amount} people saw how {person} decided the game.",
                "{person} decided the game, to the joy of {amount} people.",
            ),
        ),
        headline="{place} won the {sport} final against {other} on {day}.",
        detail="{person} decided the game, which {amount} people saw after a delay by {reason}.",
        money=False,
    ),
    Topic(
        words={
            "object": _list(
                "a gold ring;a silver cup;an old sword;a bronze bell;a Roman coin;a stone mask;"
                "an iron chest;a pearl necklace;a painted vase;a marble head"
            ),
            "activity": _list(
                "walking a dog;digging a well;picking mushrooms;repairing a fence;planting trees;"
                "cleaning a pond;plowing a field;looking for a lost key"
            ),
            "owner": _list("museum;university;church;town archive;royal collection;library"),
        },
        lead=(
            "Somebody found {object} near {place} on {day} while {activity}.",
            "While {activity} on {day}, a resident of {place} came upon {object}.",
            "On {day}, {activity} led to a surprise near {place}: {object} lay in the ground.",
        ),
        details=(
            (
                "It will be given to the {owner}.",
                "The {owner} is going to show it to the public.",
                "The {owner} has already asked for it and will get it.",
            ),
            (
                "{person}, who found it, could hardly believe that it is worth {amount}.",
                "Experts told the finder, {person}, that it is worth {amount}.",
                "It is worth {amount}, as {person}, the lucky finder, has learned.",
            ),
        ),
        headline="While {activity} near {place} on {day}, a resident found {object}.",
        detail="{person} gives the find, worth {amount}, to the {owner}.",
    ),
    Topic(
        words={
            "shop": _list(
                "bakery;bookshop;flower shop;coffee house;bicycle shop;cheese dairy;tailor shop;"
                "toy shop;tea room;fish market;music shop;pottery"
            ),
            "former": _list(
                "bank;barn;chapel;garage;fire station;stable;cinema;warehouse;tax office;prison"
            ),
        },
        lead=(
            "A new {shop} opened in {place} on {day}, in a former {former}.",
            "In {place} a former {former} became a {shop}, which opened on {day}.",
            "On {day} the people of {place} got a {shop} where there used to be a {former}.",
        ),
        details=(
            (
                "Guests at the opening came from as far as {other}.",
                "The flour, the paint and the chairs came from {other}.",
                "A similar place in {other} closed a year ago.",
            ),
            (
                "The owner, {person}, borrowed {amount} for it.",
                "{person} runs it and had to borrow {amount}.",
                "A loan of {amount} helped the owner, {person}, to begin.",
            ),
            (
                "It should pay for itself by {month}.",
                "The debts should be paid back in {month}.",
                "By {month} the business is meant to earn its own money.",
            ),
        ),
        headline="A former {former} in {place} became a {shop} on {day}.",
        detail="{person} borrowed {amount} for it, to be paid back by {month}.",
    ),
    Topic(
        words={
            "object": _list(
                "a painting;a violin;a diamond;a rare stamp;an old map;a racing bicycle;a statue;"
                "a golden clock;a fur coat;a sailing boat"
            ),
            "from_where": _list(
                "museum;hotel;castle;gallery;church;harbor office;villa;concert hall;antique shop"
            ),
            "way": _list(
                "a window;the roof;the cellar;a back door;an air shaft;the kitchen;a garden gate"
            ),
        },
        lead=(
            "Thieves stole {object} from the {from_where} in {place} on {day}.",
            "On {day} {object} disappeared from the {from_where} of {place}.",
            "The {from_where} in {place} has been missing {object} since {day}.",
        ),
        details=(
            (
                "The thieves got in through {way}.",
                "They came and left through {way}.",
                "Traces show that {way} was used to get in.",
            ),
            (
                "{rival}, who has a shop next door, heard nothing.",
                "A neighbor, {rival}, saw a white car.",
                "The guard, {rival}, was asleep.",
            ),
            (
                "Inspector {person} said that the loss amounts to {amount}.",
                "The loss amounts to {amount}, according to inspector {person}.",
                "{person} of the police put the value at {amount}.",
            ),
        ),
        headline="On {day} {object} was stolen from the {from_where} in {place}.",
        detail="{person} of the police says the thieves used {way} and took a value of {amount}.",
    ),
    Topic(
        words={
            "work": _list(
                "a novel;a film;a poem;a song;a new vaccine;a solar oven;a water filter;a cookbook;"
                "an opera;a photograph;a garden;a cheap radio"
            ),
            "plan": _list(
                "travel to Africa;buy a farm;teach children;build a studio;learn to fly;"
                "rest for a year;help the poor;write a book;restore a ship"
            ),
        },
        lead=(
            "The prize of the city of {place} was awarded on {day} for {work}.",
            "On {day} {place} awarded its yearly prize, this time for {work}.",
            "{place} gave its prize to the maker of {work} on {day}.",
        ),
        details=(
            (
                "Last year the prize went to {rival}.",
                "{rival} gave the speech.",
                "Among those who came away with nothing was {rival}.",
            ),
            (
                "The prize money will be used to {plan}.",
                "Asked about the future, the winner wants to {plan}.",
                "The next step is to {plan}, the winner said.",
            ),
            (
                "{person} receives {amount}.",
                "The prize, {amount}, goes to {person}.",
                "The winner is {person}, who gets {amount}.",
            ),
        ),
        headline="{place} awarded its prize for {work} on {day}.",
        detail="{person} won {amount} and wants to {plan}.",
    ),
    Topic(
        words={
            "building": _list(
                "tunnel;tram line;wind park;dam;ice rink;stadium;cable car;zoo;airport;canal;"
                "concert hall;cycle path;observatory;nursing home"
            ),
            "worry": _list(
                "noise;traffic;dust;the cost;rare birds;old trees;the view;the groundwater;crime"
            ),
        },
        lead=(
            "The council of {place} decided on {day} to build a new {building}.",
            "{place} will get a new {building}, the council decided on {day}.",
            "A new {building} is to be built in {place}, by a decision made on {day}.",
        ),
        details=(
            (
                "Work begins in {month}.",
                "The first stone will be laid in {month}.",
                "Builders are to start in {month}.",
            ),
            (
                "The project will cost {amount}.",
                "The council has set aside {amount}.",
                "It has a price of {amount}.",
            ),
            (
                "{person} speaks for residents who are worried about {worry}.",
                "Residents worry about {worry}, said {person}, their speaker.",
                "{person} voted against it, being worried about {worry}.",
            ),
        ),
        headline="{place} decided on {day} to build a new {building}.",
        detail="It costs {amount} and starts in {month}, but {person} is worried about {worry}.",
    ),
)

# Sentences about other people, places, days and sums, which no summary needs.
ASIDES = (
    "In {place2} the weather stayed dry until {day2}.",
    "{person2} from {place2} was not available for comment.",
    "A market in {place2} sold apples for {amount2} crowns.",
    "Trains to {place2} were late on {day2}.",
    "The choir of {place2} is looking for singers.",
    "On {day2} {person2} celebrates a birthday in {place2}.",
    "A bus ticket to {place2} now costs {amount2} crowns.",
    "{person2} collected {amount2} crowns for the animal shelter.",
    "The lake near {place2} is frozen, warned {person2}.",
    "Since {month2} the road to {place2} has been wider.",
    "{person2} lost a wallet with {amount2} crowns on {day2}.",
    "The next full moon is in {month2}.",
    "The radio station of {place2} interviewed {person2} on {day2}.",
    "A cat of {person2} returned after a week in {place2}.",
    "In {month2} the chess club meets in {place2}.",
    "{place2} lies half an hour away.",
)
