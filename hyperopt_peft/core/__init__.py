"""One level of a bilevel program."""
