"""Betty's module of problems."""

from hyperopt_peft.betty.engine import ImplicitProblem as ImplicitProblem
