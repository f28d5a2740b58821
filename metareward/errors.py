"""The one exception that means "the user can mend this".

The command line prints it as a single sentence with a non-zero exit and no traceback; everything else that escapes is a
defect of ours and keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a file, a setting or the environment; the message says what to do about it."""
