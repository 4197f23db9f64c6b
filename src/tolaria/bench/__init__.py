"""`tolaria bench`: what snapshots, rollbacks and judging cost, each beside its floor and beside other packages."""
