"""Small problems with data of scikit-learn, in float64: one with a closed form, two without."""
