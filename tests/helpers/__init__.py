"""Models and environments that tests of several areas use."""
