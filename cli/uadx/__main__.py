"""Makes ``python -m uadx`` run the command line."""

from uadx.app import main

main()
