import torch
from torch import Tensor

from hyperopt_peft import Engine, Problem, check_problem, hypergradient


class Lower(Problem):
    def loss(self, batch: Tensor) -> dict[str, Tensor]:
        fit = (w - batch).square().sum()
        return {"loss": fit + u.exp() * w.square().sum(), "fit": fit}


class Upper(Problem):
    def loss(self, batch: Tensor) -> Tensor:
        return w.square().sum()


w, u = torch.zeros(2, requires_grad=True), torch.zeros((), requires_grad=True)
lower = Lower({"w": w}.items(), data=[torch.ones(2)], optimizer=torch.optim.SGD([w], lr=0.1))
upper = Upper([u], data=[torch.ones(2)], optimizer=torch.optim.Adam([u]), prior=0.1)
engine = Engine(upper, lower, hypergradient="cg:steps=5", lower_steps=2)
loss: float = engine.run(steps=10)[-1]["upper_loss"]
(gradient,) = hypergradient(upper, lower, lambda matvec, b: 0.5 * b)
norm: Tensor = gradient.norm()
print(check_problem(upper, lower))
