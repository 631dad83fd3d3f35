"""Random bilevel problems, and the estimators beside central differences of first-order passes."""
