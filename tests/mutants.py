"""Mutation test: plants one bug at a time, and checks that the tests named beside it fail.

    python tests/mutants.py            all of them (11 CPU-minutes, two at a time)
    python tests/mutants.py kl temp    those with one of these words in their name

Each mutant is one string of one source file, replaced in a copy of the repository: the working tree is never
touched. First the killing tests must pass on an unchanged copy. A mutant is killed when pytest reports a
failure (exit status 1); anything else, a syntax error among them, counts as survival.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
PPO, LEARNING = "tests/test_ppo.py::test_", "tests/test_learning_ppo.py::test_"
DPO, REWARDS = "tests/test_dpo.py::test_", "tests/test_rewards.py::test_"
HUB, LORA = "tests/test_hub.py::test_", "tests/test_lora.py::test_"
TRITON = "tests/test_triton.py::test_"
DIST = "tests/test_dist.py::test_"  # two processes: a minute each
SLOTS, DECODE = "tests/test_slots.py::test_", "tests/test_decode.py::test_"
ORACLE = PPO + "first_gradient_is_the_oracle"  # knows the whole step, but takes 1 s and names no culprit

# (name, file, source, replacement, killing tests); a mutant of one line has its smallest direct test first
MUTANTS = [
    ("advantage sign", "train_ppo.py",
     "            adv = whiten(adv, mask)  #", "            adv = -whiten(adv, mask)  #",
     [LEARNING + "learns_to_answer_the_prompt"]),
    ("GAE: value one token late", "train_ppo.py",
     "+ gamma * next_value - value[:, t]", "+ gamma * next_value - value[:, t - 1]",
     [PPO + "gae_is_the_double_sum"]),
    ("GAE: next value of this token", "train_ppo.py",
     "delta = reward[:, t] + gamma * next_value", "delta = reward[:, t] + gamma * value[:, t]",
     [PPO + "golden_gae"]),
    ("GAE runs on behind the end", "train_ppo.py",
     "next_value = torch.where(mask[:, t], value[:, t], next_value)", "next_value = value[:, t]",
     [PPO + "gae_is_the_double_sum"]),
    ("inverted ratio", "train_ppo.py",
     "torch.where(mask, logp - old_logp, 0.0)", "torch.where(mask, old_logp - logp, 0.0)",
     [PPO + "policy_loss_branches"]),
    ("max for min in the policy loss", "train_ppo.py",
     "torch.where(mask, torch.maximum(free, held)", "torch.where(mask, torch.minimum(free, held)",
     [PPO + "policy_loss_branches"]),
    ("policy loss without a clip", "train_ppo.py",
     "-adv * ratio.clamp(1 - clip, 1 + clip)", "-adv * ratio",
     [PPO + "policy_loss_branches"]),
    ("max for min in the value loss", "train_ppo.py",
     "torch.maximum(free_error, held_error)", "torch.minimum(free_error, held_error)",
     [PPO + "value_loss_branches"]),
    ("KL sign", "train_ppo.py",
     "-beta * (logp - ref_logp)", "-beta * (ref_logp - logp)",
     [PPO + "reward_sums_to_score_less_kl"]),
    ("KL sign, seen by learning", "train_ppo.py",
     "-beta * (logp - ref_logp)", "-beta * (ref_logp - logp)",
     [LEARNING + "the_kl_penalty_draws_the_policy_to_the_reference"]),
    ("score on the last token but one", "train_ppo.py",
     "cumsum(1).flip(1) == 1)", "cumsum(1).flip(1) == 2)",
     [PPO + "score_stands_on_the_last_token_alone"]),
    ("no-EOS score inverted", "train_ppo.py",
     "torch.where(finished.bool(), score, no_eos_score)", "torch.where(finished.bool(), no_eos_score, score)",
     [PPO + "score_stands_on_the_last_token_alone"]),
    ("whitening: mean without the mask", "train_ppo.py",
     "mean = torch.where(mask, x, 0.0).sum() / n", "mean = x.mean()",
     [PPO + "golden_gae"]),
    ("whitening: unbiased variance", "train_ppo.py",
     "0.0).square().sum() / n\n", "0.0).square().sum() / (n - 1)\n",
     [PPO + "golden_whiten"]),
    ("adaptive beta runs away", "train_ppo.py",
     "kl / cfg.kl_target - 1", "1 - kl / cfg.kl_target",
     [PPO + "adaptive_beta"]),
    ("wrong grouping of prompts and rewards", "train_ppo.py",
     "[batch[g] for g in roll.group.tolist()]", "batch * cfg.group_size",
     [ORACLE, PPO + "log_line_is_what_happened"]),
    ("wrong grouping in the sampler", "nanorlhf/generate.py",
     "torch.arange(len(prompts)).repeat_interleave(n)", "torch.arange(len(prompts)).repeat(n)",
     [PPO + "first_minibatch_has_ratio_1_and_kl_0"]),
    ("advantages not permuted", "train_ppo.py",
     'minibatch["denom"] =',
     'minibatch["adv"] = adv[: len(rows_of)]\n                    minibatch["denom"] =',
     [PPO + "every_row_is_in_one_minibatch_and_its_own"]),
    ("returns not permuted", "train_ppo.py",
     'minibatch["denom"] =',
     'minibatch["ret"] = ret[: len(rows_of)]\n                    minibatch["denom"] =',
     [PPO + "every_row_is_in_one_minibatch_and_its_own"]),
    ("no zero_grad", "train_ppo.py",
     "                    opt.zero_grad()\n", "",
     [PPO + "gradients_do_not_accumulate_over_steps"]),
    ("denominator of the micro-batch", "train_ppo.py",
     "token_loss(old_logp, adv, m, cfg.clip, denom)", "token_loss(old_logp, adv, m, cfg.clip, m.sum())",
     [PPO + "microbatches_do_not_move_the_step"]),
    ("old log-probs recomputed", "train_ppo.py",
     "policy_loss(logp, old_logp[at],", "policy_loss(logp, logp.detach(),",
     [PPO + "old_logp_is_the_samplers"]),
    ("EOS unscored: mask by token id", "train_ppo.py",
     "= roll.mask, roll.logp, cfg", "= roll.mask & (roll.tokens != tok.eos_id), roll.logp, cfg",
     [ORACLE]),
    ("pad scored", "nanorlhf/generate.py",
     "(place < (plen + new)[:, None])", "(place < (plen + new + 1)[:, None])",
     [PPO + "eos_is_scored_and_the_prompt_is_not"]),
    ("temperature forgotten in the update", "train_ppo.py",
     "policy.logprobs(x, m, cfg.temperature, of_tokens)", "policy.logprobs(x, m, loss=of_tokens)",
     [PPO + "first_minibatch_has_ratio_1_and_kl_0"]),
    ("temperature forgotten in the reference", "train_ppo.py",
     "ref.logprobs(x, m, cfg.temperature)", "ref.logprobs(x, m)",
     [PPO + "first_minibatch_has_ratio_1_and_kl_0"]),
    ("temperature forgotten in the sampler's log-prob", "nanorlhf/sampling.py",
     "z = logits if temperature in (0, 1) else logits / temperature", "z = logits",
     [PPO + "first_minibatch_has_ratio_1_and_kl_0"]),
    ("log-probs one position late", "nanorlhf/model.py",
     "hidden = self(tokens[:, :-1], doc=doc)  #", "hidden = self(tokens, doc=doc)[:, 1:]  #",
     [PPO + "first_minibatch_has_ratio_1_and_kl_0"]),
    ("critic sees its own token", "nanorlhf/model.py",
     "        value = self.head(self.trunk(tokens[:, :-1]))\n        return F.pad(value, (1, 0)) * mask",
     "        return self.head(self.trunk(tokens)) * mask",
     [ORACLE]),
    ("critic is not trained", "train_ppo.py",
     "loss = pg + cfg.vf_coef * vf", "loss = pg + 0 * vf",
     [PPO + "the_critic_learns"]),
    ("critic is the reward model itself", "train_ppo.py",
     'critic, _ = hub.load(cfg.critic_init, "--critic_init",',
     "critic, _ = rm, dict(where=",
     [PPO + "only_policy_and_critic_learn"]),
    ("reward model read before the end", "nanorlhf/model.py",
     "lengths - 1])", "lengths - 2])",
     [ORACLE]),
    ("reward model read at the padded end", "nanorlhf/rewards.py",
     "roll.lengths[mb], roll.mask", "roll.lengths[mb] * 0 + roll.tokens.shape[1], roll.mask",
     [ORACLE]),
    ("weights of rewards forgotten", "nanorlhf/run/worker.py",
     "score += weight * part", "score += part",
     [PPO + "rewards_are_summed_with_their_weights"]),
    ("a reward function that hangs is not ended", "nanorlhf/run/worker.py",
     "        self._end()\n        return 0.0, why", "        return 0.0, why",
     [REWARDS + "what_a_reward_function_does_ends_with_the_call"]),
    ("a fork of the reward function answers too", "nanorlhf/run/worker.py",
     "if os.getpid() != me:", "if False:",
     [REWARDS + "what_a_reward_function_does_ends_with_the_call"]),
    ("children of the reward function stay", "nanorlhf/run/worker.py",
     "os.killpg(self.process.pid, signal.SIGKILL)", "pass",
     [REWARDS + "what_a_reward_function_does_ends_with_the_call"]),
    ("reward function outlives the trainer", "nanorlhf/run/worker.py",
     "threading.Thread(target=_end_with_parent, daemon=True).start()", "pass",
     [REWARDS + "a_killed_trainer_leaves_no_process"]),
    ("half of the calls may not fail", "nanorlhf/run/worker.py",
     "failures > len(pairs) / 2", "failures >= len(pairs) / 2",
     [REWARDS + "a_value_that_is_no_number_stops_the_run_at_once"]),
    ("one of two answers is enough", "nanorlhf/answers.py",
     "if len(answers) == 1 else None", "if answers else None",
     ["tests/test_tasks.py::test_final_answer"]),
    ("a row without an answer", "nanorlhf/answers.py",
     'if want is None or want == "":', "if False:",
     ["tests/test_tasks.py::test_a_row_that_nobody_could_answer_is_named"]),
    ("reward model: samples of other pairs", "train_rm.py",
     "in triples[:4] for", "in triples[4:8] for",
     ["tests/test_rm.py::test_samples_are_held_out_pairs_with_the_rewards_of_the_saved_model"]),
    ("process reward: steps of the prompt too", "nanorlhf/model.py",
     "return last | (mask & torch.isin(", "return last | (torch.isin(",
     ["tests/test_rm.py::test_reward_is_the_product_over_the_steps"]),
    ("process loss: by the steps of a micro-batch", "train_rm.py",
     "[rows[i] for i in mb], batch[\"pad_id\"], denom)",
     "[rows[i] for i in mb], batch[\"pad_id\"], sum(units(rows[i]) for i in mb))",
     ["tests/test_rm.py::test_process_loss_is_that_of_every_labelled_step"]),
    ("kernel: no temperature in the gradient", "nanorlhf/kernels/torch_backend.py",
     "g, h = g / ctx.temperature, h / ctx.temperature", "pass",
     ["tests/test_kernels.py::test_logprob_gradcheck"]),
    ("kernel: target of another tile", "nanorlhf/kernels/torch_backend.py",
     "here = (target >= 0) & (target < z.shape[1])", "here = target >= 0",
     ["tests/test_kernels.py::test_logprob_is_the_oracle_float64"]),
    ("kernel: one pass without the entropy's gradient", "nanorlhf/kernels/torch_backend.py",
     "h / temperature if (h != 0).any() else None", "None",
     ["tests/test_kernels.py::test_one_pass_is_the_oracle_float64"]),
    ("kernel: one pass without what comes from upstream", "nanorlhf/kernels/torch_backend.py",
     "if up.is_cuda or up != 1:", "if False:",
     ["tests/test_kernels.py::test_one_pass_is_the_oracle_float64"]),
    ("Triton: the vocabulary's tail", "nanorlhf/kernels/triton_backend.py",
     "tl.where((cols < end)[None, :], z * scale, -float(\"inf\"))", "z * scale",
     [TRITON + "the_tail_of_the_vocabulary_is_masked"]),
    ("Triton: entropy without a gradient", "nanorlhf/kernels/triton_backend.py",
     "dz = -p * (up + up_entropy *", "dz = -p * (up + 0 * up_entropy *",
     [TRITON + "half_operands_keep_fp32_logits"]),
    ("Triton: the first row's upstream gradient", "nanorlhf/kernels/triton_backend.py",
     "up = tl.load(g + rows,", "up = tl.load(g + 0 * rows,", [TRITON + "half_operands_keep_fp32_logits"]),
    ("Triton: older sums not rescaled", "nanorlhf/kernels/triton_backend.py",
     "        s = factor * s + tl.sum(e, 1)\n    out", "        s = s + tl.sum(e, 1)\n    out",
     [TRITON + "half_operands_keep_fp32_logits"]),
    ("Triton: running maximum from 0", "nanorlhf/kernels/triton_backend.py",
     "return top, z - finite", "return finite, z - finite", [TRITON + "minus_infinity_in_the_bias"]),
    ("Triton: KL's gradient the other way round", "nanorlhf/kernels/triton_backend.py",
     "    if REVERSE:\n", "    if not REVERSE:\n", [TRITON + "half_operands_keep_fp32_logits"]),
    ("pairwise loss: sign", "train_rm.py",
     "-F.logsigmoid(chosen - rejected)", "-F.logsigmoid(rejected - chosen)",
     ["tests/test_rm.py::test_loss_is_minus_log_sigmoid"]),
    ("SFT: first response token unscored", "nanorlhf/data.py",
     "[True] * len(pair[1]))]", "[False] + [True] * (len(pair[1]) - 1))]",
     ["tests/test_data.py::test_encode_demonstration"]),
    ("SFT: EOS unscored", "nanorlhf/data.py",
     "[True] * len(pair[1]))]", "[True] * (len(pair[1]) - 1) + [False])]",
     ["tests/test_data.py::test_encode_demonstration"]),
    ("SFT: attention across packed documents", "nanorlhf/model.py",
     "(start[:, :, None] == start[:, None]).tril()", "(start[:, :, None] >= 0).expand(B, T, T).tril()",
     ["tests/test_model.py::test_packed_documents_are_strangers"]),
    ("SFT: mask dropped", "train_sft.py",
     "tokens.to(device), mask.bool().to(device)", "tokens.to(device), (tokens != tok.pad_id).to(device)",
     ["tests/test_sft.py::test_mask_comes_from_lengths"]),
    ("DPO: EOS unscored", "nanorlhf/data.py",
     "(position < lengths[:, None])", "(position < lengths[:, None] - 1)",
     ["tests/test_data.py::test_response_mask"]),
    ("tokenizer: control tokens in a chat's text", "nanorlhf/tokenizer.py",
     "while self._forbidden.search(x):", "while False:",
     ["tests/test_tokenizer.py::test_a_user_cannot_write_control_tokens_into_a_chat"]),
    ("tokenizer: the shortest added token first", "nanorlhf/tokenizer.py",
     "(-len(text), text)", "(len(text), text)",
     ["tests/test_tokenizer.py::test_the_longest_added_token_wins"]),
    ("tokenizer: any table of merges is taken", "nanorlhf/tokenizer.py",
     "_need(tuple(parts) in listed", "_need(True",
     ["tests/test_tokenizer.py::test_merges_that_tiktoken_would_take_otherwise"]),
    ("tokenizer: no NFC", "nanorlhf/tokenizer.py",
     'unicodedata.normalize("NFC", part) if self.nfc else part', "part",
     ["tests/test_tokenizer.py::test_golden_ids"]),
    ("DPO: sign", "train_dpo.py",
     "delta = h_w - h_l", "delta = h_l - h_w",
     [DPO + "golden_values_and_their_gradients", DPO + "learns_a_preference_that_depends_on_the_prompt"]),
    ("DPO: prompt scored", "train_dpo.py",
     "response_mask([len(p) for p, _ in flat]", "response_mask([1 for _ in flat]",
     [DPO + "step_is_one_step_however_it_is_cut"]),
    ("DPO: denominator of the micro-batch", "train_dpo.py",
     "losses.sum() / n ", "losses.mean() ",
     [DPO + "step_is_one_step_however_it_is_cut"]),
    ("DPO: reference of other pairs", "train_dpo.py",
     "else ref_logp[order]", "else ref_logp[: len(order)]",
     [DPO + "step_is_one_step_however_it_is_cut"]),
    ("DPO: z0 of the right responses", "train_dpo.py",
     "- ref_logp)[:, 1].mean()", "- ref_logp)[:, 0].mean()",
     [DPO + "step_is_one_step_however_it_is_cut"]),
    ("DPO: worst against best", "train_dpo.py",
     "best, worst = max(", "worst, best = max(",
     [DPO + "a_reward_model_ranks"]),
    ("DPO: the reference does not follow the rounds", "train_dpo.py",
     "base.load_state_dict(policy.state_dict())", "pass",
     [DPO + "the_reference_of_a_round"]),
    ("DPO: self-judge without its reference", "train_dpo.py",
     "policy.logprobs(x, m)[0] - ref.logprobs(x, m)[0], budget", "policy.logprobs(x, m)[0], budget",
     [DPO + "the_policy_judges_itself"]),
    ("KL of evaluate.py one token late", "evaluate.py",
     "(m(tokens[:, :-1])[keep]", "(m(tokens[:, 1:])[keep]",
     ["tests/test_evaluate.py::test_both_kl_figures_have_the_mean_that_enumeration_gives"]),
    ("slots: the same uniform at every step", "nanorlhf/kernels/slots.py",
     "self.u[row, t]", "self.u[row, 0 * t]", [SLOTS + "whatever_the_slots"]),
    ("slots: an ended row writes on", "nanorlhf/kernels/slots.py",
     "at = torch.where(alive, row, self.B)", "at = row", [SLOTS + "whatever_the_slots"]),
    ("slots: the cache of another prompt", "nanorlhf/kernels/slots.py",
     "[of_row[row] - ready.start for row in rows]", "[0 for row in rows]",
     [SLOTS + "whatever_the_slots"]),
    ("slots: a row that moves forgets how far it is", "nanorlhf/kernels/slots.py",
     "(self.last, self.row, self.pos, self.t, self.alive)", "(self.last, self.row, self.pos, self.alive)",
     [SLOTS + "whatever_the_slots"]),
    ("slots: one position short", "nanorlhf/kernels/slots.py",
     "while live < held + i:", "while live < held + i - 1:", [SLOTS + "whatever_the_slots"]),
    ("slots: the host waits in every step", "nanorlhf/kernels/slots.py",
     "(alive & ~logp.isfinite()).any()", "bool((alive & ~logp.isfinite()).any())",
     [SLOTS + "a_step_is_one_fixed_sequence"]),
    ("slots: a prompt is prefilled again for its next row", "nanorlhf/kernels/slots.py",
     "if of_row[waiting[-1]] not in ready:",
     "if of_row[waiting[-1]] not in ready[:0]:\n                ready = range(of_row[waiting[-1]])",
     [SLOTS + "how_much_is_computed"]),
    ("cache: rows that leave take a position along", "nanorlhf/model.py",
     "self.kv[:, :, new, :, :live] = self.kv[:, :, old, :, :live]",
     "self.kv[:, :, new, :, : live - 1] = self.kv[:, :, old, :, : live - 1]",
     ["tests/test_model.py::test_cache_is_the_full_forward"]),
    ("decode kernel: every split reads from the start", "nanorlhf/kernels/triton_decode.py",
     "start = split * share", "start = 0 * share", [DECODE + "kernel_by_hand"]),
    ("decode kernel: beyond a row's own past", "nanorlhf/kernels/triton_decode.py",
     "z = tl.where((t < stop)[None, :], z, -float(\"inf\"))", "z = z", [DECODE + "kernel_by_hand"]),
    ("decode kernel: splits weigh the same", "nanorlhf/kernels/triton_decode.py",
     "factor = tl.exp(m - tl.max(m, 0))", "factor = tl.exp(m - m)", [DECODE + "kernel_by_hand"]),
    ("families: MLP behind the attention, not beside it", "nanorlhf/model.py",
     "self.norm2(x if self.parallel else attended)", "self.norm2(attended)",
     [HUB + "golden_outputs[pythia]", HUB + "golden_decoding[pythia]"]),
    ("families: exact GELU for its tanh form", "nanorlhf/model.py",
     '"tanh" if cfg.mlp == "gelu" else "none"', '"none"',
     [HUB + "golden_outputs[gpt2]"]),
    ("families: queries and keys not normed", "nanorlhf/model.py",
     "q, k = self.q_norm(q), self.k_norm(k)", "q, k = q, k",
     [HUB + "golden_outputs[qwen3]"]),
    ("families: the whole head rotates", "nanorlhf/model.py",
     "return int(self.head_dim * self.rope_share)", "return self.head_dim",
     [HUB + "golden_outputs[pythia]", "tests/test_model.py::test_a_share_of_the_channels_rotates"]),
    ("families: rotary scaling by the wrong end", "nanorlhf/model.py",
     "freq = keep * freq + (1 - keep) * freq / factor", "freq = (1 - keep) * freq + keep * freq / factor",
     [HUB + "golden_outputs[llama3]", "tests/test_model.py::test_longer_contexts_turn_slower"]),
    ("families: fused heads cut as GPT-2's", "nanorlhf/hub/folder.py",
     'if "query_key_value" in name:', "if False:",
     [HUB + "golden_outputs[pythia]", HUB + "golden_outputs[pythia_reward]"]),
    ("padding of the vocabulary can be sampled", "nanorlhf/model.py",
     "weight[: self.n_ids]", "weight",
     [HUB + "padded_vocabulary"]),
    ("only one id ends a response", "nanorlhf/generate.py",
     "[eos_id, *model.stop_ids]", "[eos_id]",
     ["tests/test_generate.py::test_any_of_the_stop_ids_ends_a_row"]),
    ("LoRA: the reference is a copy", "nanorlhf/lora.py",
     "{id(p): p for p in model.parameters()}", "{}",
     [LORA + "the_reference_costs_nothing_and_never_moves"]),
    ("LoRA: saved without its scale", "nanorlhf/lora.py",
     "weight + scale * B @ A", "weight + B @ A",
     [LORA + "starts_as_the_base_and_merges_into_one[pythia]"]),
    ("processes: DDP averages gradients", "nanorlhf/run/dist.py",
     "lambda f: f.value()[0]", "lambda f: f.value()[0] / size()",
     [DIST + "in_fp32_too[sft-ddp]"]),
    ("processes: FSDP2 averages gradients", "nanorlhf/run/dist.py",
     "set_gradient_divide_factor(1.0)", "set_gradient_divide_factor(float(size()))",
     [DIST + "in_fp32_too[sft-fsdp]"]),
    ("processes: each has a denominator of its own", "train_sft.py",
     'loss=token_loss(m, batch["denom"])', 'loss=token_loss(m, batch["mask"].sum())',
     [DIST + "in_fp32_too[sft-ddp]"]),
    ("processes: all sample with the draws of the first", "nanorlhf/generate.py",
     "2**63))[first_row:]", "2**63))[: len(group)]",
     [DIST + "no_two_rows_share_their_draws"]),
    ("processes: sharded moments are not resumed", "nanorlhf/run/dist.py",
     'out["optimizer"]["state"].setdefault(int(i), {})[which] = x', "pass",
     [DIST + "killed_in_mid_run_and_resumed[fsdp]"]),
    ("processes: a sharded model's new head is another one", "nanorlhf/hub/folder.py",
     '(torch.device("meta"), _Drawing())', '(torch.device("meta"),)',
     [DIST + "two_processes_take_the_steps_of_one[rm-fsdp]"]),
]  # fmt: skip


def pytest(root, tests):
    """Run the tests in a copy of the repository → exit status, output."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def copy(root):
    """Sources and tests, and nothing else."""
    for name in ("nanorlhf", "tests", "bench"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, root / path.name)
    return root


def verdict(mutant):
    """Plant the bug in a copy → "killed", or what happened instead, and the seconds it took."""
    _, file, source, replacement, tests = mutant
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        root = copy(Path(folder) / "repo")
        text = (root / file).read_text("utf-8")
        (root / file).write_text(text.replace(source, replacement), "utf-8")
        status = [pytest(root, [test])[0] for test in tests]  # each of those named must fail by itself
    what = "killed" if set(status) == {1} else f"SURVIVED (pytest: {', '.join(map(str, status))})"
    return what, time.perf_counter() - start


def main(words):
    chosen = [m for m in MUTANTS if not words or any(w.lower() in m[0].lower() for w in words)]
    for name, file, source, _, _ in chosen:
        found = (ROOT / file).read_text("utf-8").count(source)
        if found != 1:
            return f"{name}: {file} holds {source!r} {found} times, must be once; update the list of mutants"
    tests = sorted({test for m in chosen for test in m[4]})
    with tempfile.TemporaryDirectory() as folder:
        status, output = pytest(copy(Path(folder) / "repo"), tests)
    if status != 0:
        return f"{output}\nthe killing tests must pass before a bug is planted (pytest: {status})"
    wide = [max(len(m[i]) for m in chosen) for i in (0, 1)]
    killed = 0
    with ThreadPoolExecutor(2) as pool:
        for (name, file, *_), (what, seconds) in zip(chosen, pool.map(verdict, chosen)):
            print(f"{name:<{wide[0]}}  {file:<{wide[1]}}  {seconds:5.1f} s  {what}", flush=True)
            killed += what == "killed"
    print(f"{killed} of {len(chosen)} killed")
    return int(killed < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
