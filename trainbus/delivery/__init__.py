"""Records to sinks: each gets every record it can take, in order, and a receipt counts them."""
