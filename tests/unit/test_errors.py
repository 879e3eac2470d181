"""Exit codes of command lines."""

import subprocess
import sys

PROGRAM = """
import sys
from megatron_ponder.errors import ConfigError, exit_on_user_error

@exit_on_user_error
def main():
    if sys.argv[1] == "wrong":
        raise ConfigError("--x 1: must be 2.")
    while True:
        print("word " * 1000)

sys.exit(main())
"""


def test_a_reader_that_goes_away_gets_no_traceback():
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "much"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141


def test_a_mistake_of_the_user_is_two_and_a_message():
    result = subprocess.run([sys.executable, "-c", PROGRAM, "wrong"], capture_output=True)
    assert (result.returncode, result.stderr) == (2, b"ConfigError: --x 1: must be 2.\n")
