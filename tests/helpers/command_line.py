"""phireg's command line inside the test process."""

from click.testing import CliRunner

from phireg.cli import app


def run_phireg(*args, stdin=b""):
    """Run phireg; `.output` is stdout and stderr, `.exit_code` what the process would give."""
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin, prog_name="phireg")
