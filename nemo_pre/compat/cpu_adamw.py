"""AdamW for CPU ranks with the state layout of Transformer Engine's FusedAdam."""

from __future__ import annotations

import torch
from torch.optim.adam import adam


class GroupStepAdamW(torch.optim.Optimizer):
    """torch's AdamW, except that the step count lies in the parameter group, as FusedAdam's does.

    torch keeps a ``step`` tensor per parameter, which Megatron-Core cannot put into its reshardable checkpoints;
    with one integer per group a checkpoint written on CPUs has the keys of one written on GPUs. The update itself
    is torch's. Groups without a parameter on this rank count too, so that every rank writes the same groups.

    ``adam_w_mode=False`` is plain Adam, with weight decay in the gradient.
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True, capturable=False
    ):
        # Megatron 0.19 says of FusedAdam whether it runs in a CUDA graph; without a GPU there is none.
        assert not capturable
        # bias_correction is always on; the key is there because FusedAdam reads it from a loaded group.
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True}
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient."""
        assert closure is None, "Megatron-Core computes the gradients before it calls step()"
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                if not self.state[param]:
                    self.state[param]["exp_avg"] = torch.zeros_like(param)
                    self.state[param]["exp_avg_sq"] = torch.zeros_like(param)
            beta1, beta2 = group["betas"]
            adam(
                params,
                [param.grad for param in params],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                max_exp_avg_sqs=[],
                state_steps=[torch.tensor(float(group["step"] - 1)) for _ in params],  # adam() adds the 1
                foreach=False,
                fused=True,  # in one pass over the memory instead of eight
                grad_scale=None,
                found_inf=None,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                decoupled_weight_decay=self.adam_w_mode,
            )
