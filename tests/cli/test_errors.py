"""Streams that are closed or lack a letter, and messages about files that cannot be written."""

import errno
import io
import os
import sys

import pytest
from conftest import in_child
from safetensors import SafetensorError

from cli.errors import as_user_error, run_script, save_advice


def test_a_letter_that_stdout_lacks_is_escaped(tmp_path):
    """This is as with PYTHONIOENCODING=latin-1."""

    def work():
        sys.stdout = io.TextIOWrapper(open(tmp_path / "out", "wb"), encoding="latin-1")  # noqa: SIM115
        run_script(lambda: print("é → b"))

    assert in_child(work) == 0 and (tmp_path / "out").read_bytes() == b"\xe9 \\u2192 b\n"


def test_output_that_is_lost_at_the_end_is_no_success(tmp_path):
    def work():
        sys.stdout, sys.stderr = open("/dev/full", "w"), open(tmp_path / "err", "w")  # noqa: SIM115
        run_script(lambda: print("a"))

    assert in_child(work) == 5 and "No space left on device. Run again after" in (tmp_path / "err").read_text()


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "making room"),
        (errno.EDQUOT, "making room"),
        (errno.EROFS, "making the disk writable"),
        (errno.EACCES, "changing its permissions"),
        (errno.EIO, "checking the disk"),
        (errno.ESTALE, "checking the disk"),
    ],
)
def test_only_errors_about_space_are_told_to_make_room(number, fix):
    error = OSError(number, os.strerror(number), "file")
    assert save_advice(error).startswith(f"Run again after {fix}; ")
    in_rust = SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
    assert save_advice(in_rust) == save_advice(error)
    if number in (errno.ENOSPC, errno.EROFS, errno.EIO):
        assert str(as_user_error(error)) == f"file: {os.strerror(number)}. {save_advice(error)}"
