"""Writes the golden vectors of the variants of train_grpo.py, in float64.

    pip install torch==2.13.0 trl==1.16.0; pip install --no-deps verl==0.9.1 tensordict
    python tests/golden/make_variants_grpo.py

Where TRL or verl has the method, its own function computes them. TRL's GRPOTrainer._compute_loss is called
with an object that has the few attributes which it reads, and that returns given log-probs. verl's functions
are called as they are, with stand-ins for the packages that it only imports. The rest are references: float64
code of the paper's formula, by another way than the variant's, and marked so.
"""

import itertools
import json
import math
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import torch
import trl
from trl.experimental.gmpo import GMPOTrainer

for package in ("ray", "omegaconf", "codetiming", "orjson"):  # verl imports them; the functions here use none
    sys.modules.setdefault(package, MagicMock())
from verl.trainer.ppo import core_algos as verl  # noqa: E402
from verl.trainer.ppo import rollout_corr_helper as correction  # noqa: E402

OUT = Path(__file__).resolve().parents[2] / "variants/golden"
torch.set_default_dtype(torch.float64)

# Four responses to two prompts, of 5, 3, 4 and 1 tokens. All numbers are multiples of 1/64, so exact in fp32.
LENGTHS = [5, 3, 4, 1]
GROUP = [0, 0, 1, 1]
MASK = torch.arange(5) < torch.tensor(LENGTHS)[:, None]  # (B, T)
ADV = torch.tensor([1.25, -0.75, 0.5, -1.5])
generator = torch.Generator().manual_seed(0)


def numbers(low, high, shape=(4, 5)):
    """Multiples of 1/64 between low and high, 0 outside of the mask."""
    x = low + (high - low) * torch.rand(shape, generator=generator)
    return (x * 64).round() / 64 * MASK


OLD = numbers(-2.5, -0.25)
LOGP = (OLD + numbers(-0.9, 0.9)).clamp(max=-1 / 64) * MASK
SAMPLER = (OLD + numbers(-0.9, 1.2)).clamp(max=-1 / 64) * MASK
ENTROPY = numbers(0.0, 2.0)
CHECK = SimpleNamespace(
    gather=lambda x: x, reduce=lambda x, reduction: x, pad_across_processes=lambda x, dim, pad_index: x,
    num_processes=1, sync_gradients=True,
)  # fmt: skip


def plain(x):
    return x.tolist() if isinstance(x, torch.Tensor) else x


def token_mean(mask=MASK):
    return mask / mask.sum()


def sequence_mean(mask=MASK):
    return mask / mask.sum(1, keepdim=True) / len(mask)


def call(function, inputs, value, gradient=None, config=None):
    """A call as tests/test_variants.py makes it. value, gradient: those of the published code."""
    found = {"function": function, "inputs": {name: plain(x) for name, x in inputs.items()}}
    if config is not None:
        found["config"] = config
    gradient = {name: plain(x) for name, x in (gradient or {}).items()}
    return found | {"value": plain(value), "gradient": gradient}


def policy_loss(loss, w, config=None, old=OLD, adv=ADV, **more):
    """loss, a function logp → scalar of the published code → the call of policy_loss that must equal it."""
    logp = LOGP.clone().requires_grad_()
    value = loss(logp)
    value.backward()
    inputs = dict(logp=LOGP, old_logp=old, ref_logp=None, adv=adv, mask=MASK, w=w) | more
    return call("policy_loss", inputs, value.item(), {"logp": logp.grad}, config or {})


def gradient_of(loss):
    logp = LOGP.clone().requires_grad_()
    loss(logp).backward()
    return logp.grad


def write(name, origin, *calls):
    text = json.dumps({"origin": origin, "calls": calls})
    (OUT / f"{name}.json").write_text(text.replace('{"function"', '\n{"function"') + "\n", "utf-8")


# ------------------------------------------------------------------------------------------------------------
# TRL


def trl_loss(logp, cls=trl.GRPOTrainer, mask=MASK, adv=ADV, old=OLD, **settings):
    """GRPOTrainer._compute_loss of rows whose prompts are one token."""
    args = SimpleNamespace(
        delta=None, use_bias_correction_kl=True, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
        vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0, steps_per_generation=1,
    )  # fmt: skip
    trainer = SimpleNamespace(
        args=args, accelerator=CHECK, model=SimpleNamespace(training=True), beta=0.0, loss_type="dapo",
        importance_sampling_level="token", epsilon_low=0.2, epsilon_high=0.2, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, use_vllm=False, vllm_importance_sampling_correction=False,
        aux_loss_enabled=False, _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1,
        max_completion_length=5, _metrics=defaultdict(lambda: defaultdict(list)),
        get_off_policy_mask=trl.GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=trl.GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *a, **k: (logp, ENTROPY, None),
    )  # fmt: skip
    trainer.get_high_entropy_mask = lambda *a: trl.GRPOTrainer.get_high_entropy_mask(trainer, *a)
    vars(trainer).update(settings)
    column = torch.zeros(len(logp), 1, dtype=torch.int64)
    inputs = {
        "prompt_ids": column, "prompt_mask": column + 1, "completion_ids": torch.zeros_like(mask).long(),
        "completion_mask": mask.long(), "advantages": adv, "old_per_token_logps": old,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return cls._compute_loss(trainer, None, inputs)


def from_trl():
    origin = f"trl {trl.__version__}: GRPOTrainer._compute_loss"
    w = sequence_mean()
    found = policy_loss(lambda logp: trl_loss(logp, loss_type="sapo"), w)
    write("sapo", f"{origin}, loss_type sapo", found)

    found = policy_loss(lambda logp: trl_loss(logp, GMPOTrainer, epsilon_low=0.4, epsilon_high=0.4), w)
    write("gmpo", f"trl {trl.__version__}: GMPOTrainer._compute_loss, epsilon 0.4", found)

    found = policy_loss(lambda logp: trl_loss(logp, loss_type="vespo"), token_mean())
    write("vespo", f"{origin}, loss_type vespo", found)

    # With these signs rows 0 and 2 are failures, by 0.27 and 0.09 nats a token less likely than when sampled.
    calls = []
    for delta in (0.0625, 0.125, 0.5):
        loss = partial(trl_loss, off_policy_mask_threshold=delta, loss_type="grpo", adv=-ADV)
        calls.append(policy_loss(loss, w, {"off_policy_delta": delta}, adv=-ADV))
    assert len({each["value"] for each in calls}) == 3
    write("off_policy_mask", f"{origin}, off_policy_mask_threshold", *calls)

    chosen = trl.GRPOTrainer.get_high_entropy_mask(SimpleNamespace(accelerator=CHECK), ENTROPY, MASK, 0.8)
    first = call("most_uncertain", dict(entropy=ENTROPY, mask=MASK), chosen.double())
    loss = partial(trl_loss, top_entropy_quantile=0.2)
    second = policy_loss(loss, token_mean(), adv=ADV[:, None] * chosen)
    write("entropy_top_fifth", f"{origin} and get_high_entropy_mask, top_entropy_quantile 0.2", first, second)

    # With ratio 1 and advantage −1 the gradient of the loss is the weight of each token.
    finished = torch.tensor([True, False, True, True])
    inputs = dict(mask=MASK, group=torch.tensor(GROUP), finished=finished)
    counted = MASK & finished[:, None]
    calls = []
    for loss_type, agg in (("dapo", "token"), ("grpo", "seq_mean"), ("dr_grpo", "seq_sum_const")):
        loss = partial(trl_loss, mask=counted, adv=-torch.ones(4), old=LOGP, loss_type=loss_type)
        config = {"agg": agg, "max_new_tokens": 5}
        calls.append(call("token_weights", inputs, gradient_of(loss), config=config))
    write("overlong_filter", f"{origin}, gradient, truncated rows masked", *calls)


# ------------------------------------------------------------------------------------------------------------
# verl


def verl_config(**settings):
    names = ("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio", "ppo_kl_coef")
    policy = SimpleNamespace(**{name: settings.get(name) for name in names})
    found = SimpleNamespace(clip_ratio=settings.get("clip", 0.2), clip_ratio_low=None, clip_ratio_high=None,
                            global_batch_info={}, policy_loss=policy)  # fmt: skip
    found.get = lambda name, default: settings.get(name, default)
    return found


def verl_loss(function, logp, adv=ADV, old=OLD, weights=None, **settings):
    wide = adv[:, None].expand(MASK.shape).clone()
    mask = MASK.double()
    return function(old, logp, wide, mask, "token-mean", verl_config(**settings), weights)[0]


def from_verl():
    w = token_mean()
    loss = partial(verl_loss, verl.compute_policy_loss_dppo_tv, clip=0.15)
    write("dppo_tv", "verl 0.9.1: compute_policy_loss_dppo_tv, clip_ratio 0.15", policy_loss(loss, w))

    far = LOGP - 4 * MASK  # ratios of e^4, where the bound acts
    vanilla = partial(verl_loss, verl.compute_policy_loss_vanilla)
    calls = [policy_loss(vanilla, w), policy_loss(partial(vanilla, old=far), w, old=far)]
    delta = SimpleNamespace(delta=3.0, steps_per_generation=1)  # the two-sided clip of INTELLECT-2
    two_sided = partial(trl_loss, old=far, args=delta)
    calls.append(policy_loss(two_sided, w, old=far))
    origin = "verl 0.9.1: compute_policy_loss_vanilla, clip_ratio_c 3"
    write("dual_clip", f"{origin}; trl {trl.__version__}: GRPOTrainer._compute_loss, delta 3", *calls)

    # Which tokens verl selects shows in its gradient. With a clip of 10 nothing else is clipped.
    adv = torch.tensor([3.0, -1.0, 0.5, -3.0])
    inputs = dict(logp=LOGP, adv=adv, mask=MASK)
    share = 0.5  # more tokens than there are in the band, so verl leaves nothing to chance
    loss = partial(verl_loss, verl.compute_policy_loss_clip_cov, adv=adv, clip_cov_ratio=share, clip=10)
    kept = gradient_of(loss) != 0
    assert 2 <= (MASK & ~kept).sum() <= share * MASK.sum()
    first = call("clip_cov", inputs | {"step": 0}, kept.double(), config={"cov_share": share})
    wide = {"clip_low": 10.0, "clip_high": 10.0}
    second = policy_loss(loss, w, wide, adv=adv[:, None] * kept)
    write("clip_cov", f"verl 0.9.1: compute_policy_loss_clip_cov, clip_cov_ratio {share}", first, second)

    share = 0.25
    loss = partial(verl_loss, verl.compute_policy_loss_kl_cov, adv=adv, kl_cov_ratio=share, ppo_kl_coef=1.0)
    held = gradient_of(loss) != gradient_of(partial(loss, ppo_kl_coef=0.0))
    assert held.sum() == int(share * MASK.sum())
    first = call("largest_cov", inputs, held.double(), config={"cov_share": share})
    second = policy_loss(loss, w, adv=adv, held=held)
    write("kl_cov", f"verl 0.9.1: compute_policy_loss_kl_cov, kl_cov_ratio {share}", first, second)

    # Weights between sampler and trainer; OLD is what the trainer computed.
    log_ratio = OLD - SAMPLER
    inputs = dict(trainer_logp=OLD, sampler_logp=SAMPLER)
    for name, level, bounds in (
        ("tis", "token", 2.0),
        ("icepop", "token", "0.5_5.0"),
        ("seq_tis", "sequence", 2.0),
        ("seq_mis", "sequence", "1e-9_3.0"),
    ):
        weight = correction.compute_rollout_correction_weights(log_ratio, MASK.double(), level, bounds)[0]
        assert 2 <= (weight[MASK] != log_ratio.exp()[MASK]).sum()  # some are cut
        found = weight[:, :1] if level == "sequence" else torch.where(MASK, weight, 1.0)
        first = call("sampler_weight", inputs, found)
        second = policy_loss(partial(vanilla, weights=weight), w, adv=ADV[:, None] * weight)
        origin = f"verl 0.9.1: compute_rollout_correction_weights, {level} {bounds}"
        write(name, f"{origin}, and compute_policy_loss_vanilla", first, second)
    calls = []
    for band in (0.05, 0.25):
        bounds = f"{math.exp(-band)!r}_{math.exp(band)!r}"
        found = correction.compute_rollout_rejection_mask(log_ratio, MASK.double(), "seq_mean_k1", bounds)[0]
        kept = found.amax(1, keepdim=True)
        calls.append(call("sampler_weight", inputs | {"mask": MASK}, kept, config={"geo_band": band}))
    write("geo_mask", "verl 0.9.1: compute_rollout_rejection_mask, seq_mean_k1", *calls)

    # Advantages. verl takes rewards per token, at any of them.
    reward = torch.tensor([1.0, 0.0, 0.25, 0.75, 0.5, 0.5, -1.0, 2.0])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    length = torch.tensor([5, 3, 4, 1, 2, 5, 4, 1])
    mask = (torch.arange(5) < length[:, None]).double()
    at_first = torch.zeros(8, 5)
    at_first[:, 0] = reward
    index = np.array(group.tolist())
    found = verl.compute_opo_outcome_advantage(at_first.clone(), mask, index)[0][:, 0]
    inputs = dict(reward=reward, group=group, norm="none", length=length)
    write("opo", "verl 0.9.1: compute_opo_outcome_advantage", call("advantages", inputs, found))

    greedy = torch.tensor([0.5] * 4 + [1.0] * 4)
    found = verl.compute_remax_outcome_advantage(at_first.clone(), greedy, mask)[0][:, 0]
    inputs = dict(reward=reward, greedy=greedy)
    write("remax", "verl 0.9.1: compute_remax_outcome_advantage", call("beyond_greedy", inputs, found))

    parts = torch.tensor([[1, 0], [0, 0.5], [1, 0.25], [0, 0], [1, 3], [1, 0], [1, 1], [1, -2.0]])
    weights = [1.0, 0.5]
    one = torch.ones(8, 1)  # responses of one token: verl whitens over tokens, the paper over responses
    batch = {"prompts": one, "attention_mask": torch.ones(8, 2).long()}
    columns = {"first": parts[:, 0].numpy(), "second": parts[:, 1].numpy()}
    keys = {"gdpo_reward_keys": list(columns), "gdpo_reward_weights": weights}
    config = SimpleNamespace(get=lambda name, default=None: keys.get(name, default))
    more = dict(config=config, non_tensor_batch=columns, batch=batch)
    found = verl.compute_gdpo_outcome_advantage(one, one, index, **more)
    inputs = dict(parts=parts, weights=weights, group=group, std_eps=1e-6)
    write("gdpo", "verl 0.9.1: compute_gdpo_outcome_advantage", call("decoupled", inputs, found[0][:, 0]))


# ------------------------------------------------------------------------------------------------------------
# References


def references():
    """Two advantages that no release computes, by loops over groups, and over all groups of k of a group."""
    reward = [1, 0, 0, 0, 0, 0, 1, 0, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    group = [i // 6 for i in range(24)]
    maxrl = []
    for start in range(0, 24, 6):
        right = sum(reward[start : start + 6])
        for r in reward[start : start + 6]:  # score function of the right ones' mean, less that of all
            maxrl.append(6 * (r / right - 1 / 6) if right else 0.0)
    inputs = dict(reward=torch.tensor(reward).double(), group=torch.tensor(group))
    origin = "reference: arXiv 2602.02710, the mean score of right samples less that of all, by loops"
    write("maxrl", origin, call("advantages", inputs, maxrl))

    calls = []
    for k in (1, 3, 4):
        found = []
        for start in range(0, 24, 6):
            subsets = list(itertools.combinations(range(6), k))
            best = [max(reward[start + i] for i in subset) for subset in subsets]
            mean = sum(best) / len(best)
            std = math.sqrt(sum((b - mean) ** 2 for b in best) / len(best))
            for i in range(6):
                with_i = [(b - mean) / std for b, subset in zip(best, subsets) if i in subset and std]
                found.append(sum(with_i) / len(with_i) if with_i else 0.0)
        calls.append(call("advantages", inputs | {"pass_k": k}, found))
    write("pass_at_k", "reference: enumeration of the groups of k of arXiv 2508.10751, section 2", *calls)


if __name__ == "__main__":
    from_trl()
    from_verl()
    references()
