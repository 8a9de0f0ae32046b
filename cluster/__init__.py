"""Where the jobs run: Ray on this machine or on a cluster."""
