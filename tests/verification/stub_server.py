"""An OpenAI-compatible server of a tiny model, which may have a fault that servers have."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class Stub:
    """Answers requests by ``logits``, a function (ids, lengths of all prompts) -> [tokens, V].

    ``scoring`` is how it gives a prompt's log probabilities: "echo", "prompt_logprobs" or None.
    """

    def __init__(self, logits, tokenizer=None, stops=(), scoring="echo"):
        self.logits, self.tokenizer, self.stops = logits, tokenizer, stops
        self.scoring = scoring
        self.requests = 0

    def models(self):
        return {"object": "list", "data": [{"id": "phi", "object": "model"}]}

    def complete(self, body):
        prompts = body["prompt"]
        lengths = [len(prompt) for prompt in prompts]
        choices = [
            {"index": index, **self.continued(prompt, lengths, body)}
            for index, prompt in enumerate(prompts)
        ]
        return {"choices": choices}

    def continued(self, prompt, lengths, body):
        scores = self.scores(prompt, lengths)
        row, new, reason = list(prompt), [], "length"
        for _ in range(body["max_tokens"]):
            best = self.logits(row, lengths)[-1].log_softmax(-1).max(-1)
            row.append(int(best.indices))
            new.append(float(best.values))
            if row[-1] in self.stops:
                reason = "stop"
                break
        choice = {"text": "", "finish_reason": reason, "tokens": len(new)}
        if body.get("echo") and self.scoring == "echo":
            return choice | {"logprobs": {"token_logprobs": [None, *scores, *new]}}
        choice |= {"logprobs": {"token_logprobs": new}}
        if body.get("prompt_logprobs") and self.scoring == "prompt_logprobs":
            entries = [
                {str(token): {"logprob": score, "rank": 1}}
                for token, score in zip(prompt[1:], scores, strict=True)
            ]
            choice["prompt_logprobs"] = [None, *entries]
        return choice

    def scores(self, prompt, lengths):
        rows = self.logits(prompt, lengths)[:-1].log_softmax(-1)
        return rows.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()

    def chat(self, body):
        prompt = self.tokenizer.chat_ids(body["messages"])
        choice = self.continued(prompt, [len(prompt)], {"max_tokens": body["max_tokens"]})
        return {
            "choices": [{**choice, "message": {"role": "assistant", "content": ""}}],
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": choice["tokens"]},
        }


@contextmanager
def serving(stub):
    """Serve on the loopback; the value is the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(stub.models())

        def do_POST(self):
            stub.requests += 1
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(stub.chat(body) if "messages" in body else stub.complete(body))

        def answer(self, document):
            raw = document if isinstance(document, bytes) else json.dumps(document).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
