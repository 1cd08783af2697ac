"""Long forms of tests: plain scripts, each with a count as its argument, each printing one line of figures."""
