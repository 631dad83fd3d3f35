"""Three levels on real data: how far may the penalties of the features differ?

    top     u: a prior of the penalties, strength and centre     second validation set
    middle  v: a penalty for each feature, pulled to the prior   first validation set
    bottom  w: the weights of a ridge regression                 training set

One penalty for all features is crude, and a penalty for each overfits the few examples that choose
it. A prior of the penalties, chosen by other examples, lies in between. The data are scikit-learn's
diabetes, with the squares and products of its ten features.
"""

import argparse

import torch
from hyperopt_peft import Engine, Nested, Problem
from hyperopt_peft.engine import minimize
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from torch.optim import SGD, Adam

SIZES = {"train": 100, "first": 50, "second": 100}  # the other 192 are for the test


def split(seed):
    """The sets of examples by name: standardised inputs and targets, float64."""
    x, y = load_diabetes(return_X_y=True)
    x = PolynomialFeatures(2, include_bias=False).fit_transform(StandardScaler().fit_transform(x))
    sets, rest = {}, (x, y.reshape(-1, 1))
    for name, size in SIZES.items():
        x, x_rest, y, y_rest = train_test_split(*rest, train_size=size, random_state=seed)
        sets[name], rest = (x, y), (x_rest, y_rest)
    sets["test"] = rest
    scale = [StandardScaler().fit(part).transform for part in sets["train"]]
    return {name: [torch.tensor(f(p)) for f, p in zip(scale, s)] for name, s in sets.items()}


class Error(Problem):
    """Half the mean squared error of the weights w on some of the sets, plus a penalty."""

    def __init__(self, variables, optimizer, w, *sets, penalty=lambda: 0.0):
        self.w, self.penalty = w, penalty
        self.x, self.y = (torch.cat(parts) for parts in zip(*sets))
        super().__init__([variables], optimizer=optimizer)

    def loss(self, batch):
        """Half the mean squared error, plus the penalty."""
        return (self.x @ self.w - self.y.squeeze(1)).square().mean() / 2 + self.penalty()


def leaf(*values, size=1):
    """A level's variables: ``values``, repeated ``size`` times."""
    return torch.tensor(values * size, dtype=torch.float64, requires_grad=True)


def lower_level(sets, v):
    """The weights, and their level under the penalties v."""
    w = leaf(0.0, size=65)
    sgd = SGD([w], lr=0.05, momentum=0.9)

    def penalty():
        return 10 * (v.sigmoid() * w.square()).sum() / 2

    return w, Error(w, sgd, w, sets["train"], penalty=penalty)


def two_levels(sets, names, penalties, steps):
    """Learn 1 or 65 ``penalties`` on the sets ``names``; return w and its level."""
    v = leaf(-3.0, size=penalties)
    w, weights = lower_level(sets, v)
    upper = Error(v, Adam([v], lr=0.1), w, *(sets[name] for name in names))
    Engine(upper, weights, "cg:steps=20", lower_steps=10, progress=False).run(4 * steps)
    return w, weights


def three_levels(sets, steps):
    """Learn a penalty for each feature, and a prior of the penalties."""
    v, u = leaf(-3.0, size=65), leaf(-3.0, -3.0)
    w, weights = lower_level(sets, v)

    def prior():
        return u[0].exp() * (v - u[1]).square().mean() / 2

    middle = Error(v, Adam([v], lr=0.1), w, sets["first"], penalty=prior)
    top = Error(u, Adam([u], lr=0.2), w, sets["second"])
    penalties = Nested(middle, weights, "cg:steps=20", lower_steps=10)
    method = "cg:product=difference,steps=5"
    Engine(top, penalties, method, lower_steps=4, progress=False).run(steps)
    return w, weights


def main():
    """Train on each split, and print the errors on the test sets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--splits", type=int, default=2, help="random splits of the data")
    parser.add_argument("--steps", type=int, default=40, help="steps of the top level")
    args = parser.parse_args()
    methods = {
        "one penalty, both sets": lambda s: two_levels(s, ["first", "second"], 1, args.steps),
        "a penalty each, first set": lambda s: two_levels(s, ["first"], 65, args.steps),
        "a penalty each, both sets": lambda s: two_levels(s, ["first", "second"], 65, args.steps),
        "with a prior, three levels": lambda s: three_levels(s, args.steps),
    }
    print("mean squared error on the test set ÷ variance of the training targets")
    for name, train in methods.items():
        errors = []
        for seed in range(args.splits):
            sets = split(seed)
            w, weights = train(sets)
            minimize(weights, tolerance=1e-6)
            with torch.no_grad():
                errors.append(2 * Error(w, None, w, sets["test"]).loss(None).item())
        mean = sum(errors) / len(errors)
        print(f"{name:28s} {mean:.3f}   ({', '.join(f'{e:.3f}' for e in errors)})")


if __name__ == "__main__":
    main()
