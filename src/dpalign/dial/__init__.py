"""Using an aligned model: the dial, export, doctor, verify, server and terminal chat."""

from typing import Final

TEMPERATURE: Final = 0.7
"""The default where no recipe gives one: section 3.2's, and the released policy's."""
