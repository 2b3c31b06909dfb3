"""What keeps a run safe and a command friendly. A reader of the method may skip this folder.

    script.py      the command line: flags, --help, errors as one sentence
    run.py         a run's folder: what it may overwrite, how it resumes, its logs and pictures
    checkpoint.py  files that are saved and read back
    machine.py     device, precision, several processes
    log.py         the log, the progress bar, Ctrl-C
    saved.py       opens what runs left, for sampling; files of raw samples
    plan.py        what a run on latents will do, need and cost
    hub.py         networks of other packages, from a folder or from the Hugging Face hub
    pictures.py    figures
"""


class UserError(Exception):
    """An error that the user can fix: one sentence, printed without a traceback, exit code 2."""


def first_line(error):
    """The first line of an exception's message, or its type's name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
