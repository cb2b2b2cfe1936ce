"""`python -m dpalign`, the same as `dpa`."""

from dpalign.cli import main

main()
