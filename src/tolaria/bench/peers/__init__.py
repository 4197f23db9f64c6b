"""The contestants of `tolaria bench --peers`: other packages, by their public calls, each where it is installed."""
