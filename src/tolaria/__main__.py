"""`python -m tolaria`."""

from tolaria.cli import main

raise SystemExit(main())
