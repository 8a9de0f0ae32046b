"""Other machines: jobs sent to a cluster, and what a run on one would cost. Imports all before it."""
