"""tokens.jsonl.gz of a run: what the trainer knew about every token of a few rows, one line of JSON a step.

    zcat runs/reviews-ppo/tokens.jsonl.gz | head -1

A line is {"step", "rows", ...}. A row has "ids" and "text" of its tokens, "mask", a string of 0 and 1, and
for each quantity a list of numbers, one for each 1 in the mask: {"old_logp": [-1.2, ...], "adv": [...]}. The
names are those of the trainer's tensors. Numbers have 4 significant digits, ratios 6; what is not finite is
null. Other lines are {"step", "held_out"}: responses to the same held-out prompts before and after training.

Each line is a gzip member of its own: a file that a crash cut off is read up to that line.
"""

import contextlib
import gzip
import json
import math
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F

from nanorlhf.data import pad_responses, take_rows, trim
from nanorlhf.kernels import linear_jsd, linear_kl
from nanorlhf.run import dist, sharding
from nanorlhf.run.device import at_work

FILE = "tokens.jsonl.gz"
MEMBER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00"  # how a gzip member without a time begins
MOST_UPDATES = 16  # of one step after which the rows are scored again
SHARE = 0.01  # of a run's forward and backward passes, at most: with texts and JSON this is 2% of its time
STEP_PASSES = 5  # forward passes of all rows that a step costs, about: sampling, scoring, the updates
HELD_OUT = 8  # prompts whose responses before and after are kept
MOST_GROUPS = 64  # of one step whose rewards are kept
NOT_PER_TOKEN = {"tokens", "mask", "lengths", "group", "row"}


# ------------------------------------------------------------------------------------------------------------
# the file


def pack(record):
    """A record as a gzip member. Equal records give equal bytes, because the time is left out."""
    line = json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"  # ASCII: also half characters
    return gzip.compress(line.encode(), 5, mtime=0)


def read(run):
    """tokens.jsonl.gz of a run folder → list of its records; [] where there is none.

    A member that a crash or a full disk cut off is left out, and the ones behind it are read.
    """
    path = Path(run, FILE)
    data = path.read_bytes() if path.is_file() else b""
    records = []
    start = 0
    while start >= 0 and start < len(data):
        unpacker = zlib.decompressobj(31)  # 31: with gzip's header and checksum
        with contextlib.suppress(zlib.error, ValueError, RecursionError):
            line = unpacker.decompress(data[start:])
            if unpacker.eof:
                records.append(json.loads(line))
        if unpacker.eof:
            start = len(data) - len(unpacker.unused_data)
        else:
            start = data.find(MEMBER, start + 1)
    return [record for record in records if isinstance(record, dict)]


def rounded(x, digits=4):
    """Nested lists of numbers → the same with so many significant digits; None for what is not finite."""
    if isinstance(x, list):
        return [rounded(value, digits) for value in x]
    if not isinstance(x, float):
        return x
    return float(f"{x:.{digits}g}") if math.isfinite(x) else None


def inside(x, mask, digits=4):
    """(n, T) values and mask → a list for each row of its rounded values inside the mask."""
    lengths = mask.sum(1).tolist()
    rows = x[mask].float().split(lengths)
    return [rounded(row.tolist(), digits) for row in rows]


# ------------------------------------------------------------------------------------------------------------
# writing


class TokenLog:
    """Writes the records of a run. `append` takes bytes; --look_rows 0 writes nothing.

    seconds: the time spent here, to be held against that of the run.
    """

    def __init__(self, cfg, tok, append):
        self.cfg = cfg
        self.tok = tok
        self.append = append
        self.rows = cfg.look_rows
        self.record = None  # of the rollout that is being trained on
        self.seconds = 0.0

    # A sharded model needs all processes for a forward pass; otherwise the first does all of this alone.
    @property
    def works(self):
        return self.rows > 0 and (dist.rank() == 0 or self.cfg.shard)

    @contextlib.contextmanager
    def _timed(self):
        start = time.perf_counter()
        with torch.no_grad():
            yield
        self.seconds += time.perf_counter() - start

    def _named(self, tokens, lengths, mask):
        """(n, T), (n,), (n, T) → a dict for each row with its ids, their texts and its mask."""
        named = []
        for ids, length, inside_row in zip(tokens.tolist(), lengths.tolist(), mask.int().tolist()):
            ids = ids[:length]
            texts = [self.tok.decode([i]) for i in ids]  # half a character is shown as U+FFFD
            bits = "".join(map(str, inside_row[:length]))
            named.append({"ids": ids, "text": texts, "mask": bits})
        return named

    def _few(self, lengths):
        """Lengths of all rows → how many are shown: --look_rows, and no more than fit one micro-batch.

        All are scored in one pass: 16 rows of 4,000 tokens would need more memory than training does.
        """
        n = min(self.rows, len(lengths))
        budget = self.cfg.tokens_per_microbatch
        if budget:
            n = min(n, budget // max(lengths[:n]))
        return max(1, n)

    def _few_pairs(self, lengths):
        """Lengths of the longer row of each pair → how many of the pairs are shown."""
        return max(1, self._few([length for length in lengths for _ in range(2)]) // 2)

    # ---- a rollout and its updates

    def rollout(self, step, roll, policy, batch, tensors):
        """Begin the record of a rollout, before its updates.

        batch and tensors: {name: (B, T) of each token, (B,) of each row, or a number}, under the trainer's
        own names. It adds batch["row"], the number of each row, by which `minibatch` finds them again.
        """
        if not self.works or not self._affordable(step, len(roll)):
            return
        with self._timed():
            batch["row"] = torch.arange(len(roll), device=roll.tokens.device)
            first = trim(take_rows(batch | tensors, torch.arange(self._few(batch["lengths"].tolist()))))
            mask = first["mask"]
            rows = self._named(first["tokens"], first["lengths"], mask)
            self.record = {"step": step, "rows": rows, "groups": self._groups(roll, batch | tensors)}
            self.first = first
            self.policy = policy
            self.updates = 0
            self.sampled_here = getattr(self.cfg, "on_policy", True)
            if "ret" in first:
                first |= _before_whitening(first, self.cfg.gamma, getattr(self.cfg, "lam", math.nan))
            if self.sampled_here:
                first["entropy"] = self._score()
            else:  # the teacher has sampled, or nobody: roll.logp is not the student's, and there is no ratio
                first["old_logp"], first["entropy"] = self._logprobs()
            if first.get("ref_logp") is not None:
                first["log_ratio"] = first["old_logp"] - first["ref_logp"]
            for name, x in first.items():
                self._put(name, x)
            for i, row in enumerate(rows):
                row["group"] = roll.group[i].item()
                row["finished"] = roll.finished[i].item()
            self._put("score", roll.reward)

    def _affordable(self, step, n_rows):
        """Whether the record of this step keeps its passes within SHARE of the run's; the last step is kept.

        16 of 256 rows, scored five times, cost 1/16 of a step: one in seven may have them. 16 of 64 rows, the
        settings of real models, cost a quarter of a step: one in 25 may.
        """
        updates = getattr(self.cfg, "epochs", 1) * getattr(self.cfg, "minibatches", 1)
        passes = 1 + min(updates, MOST_UPDATES)
        if hasattr(self.cfg, "divergence"):
            passes += 3  # of teacher and student once more, and their divergences
        cost = min(self.rows, n_rows) * passes / (n_rows * STEP_PASSES)  # of one step
        cost *= dist.size()  # that many share the step, and wait while the first one scores these rows
        logged = max(1, math.ceil(cost / SHARE / self.cfg.sample_every))  # steps that are logged, to one here
        return step % (logged * self.cfg.sample_every) == 0 or step + 1 == self.cfg.steps

    def _put(self, name, x):
        """Into the record: a number, or the values of each row or of each token."""
        if name in NOT_PER_TOKEN or x is None:
            return
        if not isinstance(x, torch.Tensor):
            self.record[name] = rounded(x)
            return
        mask = self.first["mask"]
        if x.dim() == 1:
            values = rounded(x.float().tolist())
        elif x.dim() == 2:
            values = inside(x.expand_as(mask), mask)  # some variants have (B, 1)
        else:
            return
        for row, value in zip(self.record["rows"], values):
            row[name] = value

    def _score(self):
        """Append to each row the ratio π/π_old of its tokens under the policy as it is → entropy (n, T)."""
        mask = self.first["mask"]
        logp, entropy = self._logprobs()
        log_ratio = logp - self.first["old_logp"]
        if getattr(self.cfg, "ratio", "") == "sequence":  # GSPO's loss sees the geometric mean of the row
            n = mask.sum(1, keepdim=True).clamp(min=1)
            log_ratio = (log_ratio.sum(1, keepdim=True) / n).expand_as(logp)
        for row, values in zip(self.record["rows"], inside(log_ratio.exp(), mask, 6)):
            row.setdefault("ratio", []).append(values)
        return entropy

    def _logprobs(self):
        """Log-probs and entropies (n, T) of the rows under the policy as it is."""
        first = self.first
        logp, entropy = self.policy.logprobs(first["tokens"], first["mask"], self.cfg.temperature)
        sharding.reshard(self.policy)  # what this pass has gathered would be stale after the update
        return logp, entropy

    def _groups(self, roll, tensors):
        """Score, reward and advantage of all rows of the first groups, where they are one number a row."""
        most = int((roll.group < MOST_GROUPS).sum())
        groups = {"group": roll.group[:most].tolist()}
        found = {"score": roll.reward, "reward": tensors.get("reward"), "adv": tensors.get("adv")}
        for name, x in found.items():
            if x is not None and x.dim() == 1:
                groups[name] = rounded(x[:most].float().tolist())
        return groups

    def after_update(self, *_):
        """Called behind every optimizer step: score the rows again."""
        if self.record is None:
            return
        self.updates += 1
        if self.updates <= MOST_UPDATES and self.sampled_here:
            with self._timed():
                self._score()

    def end(self):
        """Write the record of the rollout, when its step is done."""
        if self.record is not None:
            with self._timed():
                self.append(pack(self.record))
        self.record = None

    # ---- the batch of an optimizer step, before its update

    def minibatch(self, batch, models):
        """Of a recorded rollout: the weight of its tokens in the loss, and how many updates came before."""
        if self.record is None:
            return
        with self._timed():
            rows = self.record["rows"]
            if "w" in batch:
                weight = batch["w"]
            else:
                weight = batch["mask"] / batch["denom"]
            for j, i in enumerate(batch["row"].tolist()):
                if i < len(rows):
                    if self.updates <= MOST_UPDATES:  # of later ones there is no ratio
                        rows[i].setdefault("update", []).append(self.updates)
                    if "w" not in rows[i]:
                        own = weight[j][batch["mask"][j]]  # (tokens of the response,)
                        rows[i]["w"] = rounded(own.tolist())
            if hasattr(self.cfg, "divergence") and self.updates == 0:
                self._divergence(*models)

    def _divergence(self, student, teacher):
        """Of distillation: the loss of each token, and the teacher's log-prob of it."""
        first = self.first
        tokens = first["tokens"]
        mask = first["mask"]
        T = self.cfg.temperature
        with at_work(teacher):
            teacher_logp, _ = teacher.logprobs(tokens, mask, T)
            ref_hidden = teacher.hidden_before(tokens, mask)  # (n, D')
            hidden = student.hidden_before(tokens, mask)  # (n, D)
            sides = (hidden, student.unembedding, ref_hidden, teacher.unembedding)
            kl = linear_kl(*sides, T)  # (n,)
            if self.cfg.divergence == "jsd":
                loss = linear_jsd(*sides, self.cfg.jsd_beta, T)
            else:
                loss = linear_kl(*sides, T, reverse=self.cfg.divergence == "forward")
        for name, values in {"kl": kl, "divergence": loss}.items():
            per_token = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
            per_token[mask] = values.float()
            self._put(name, per_token)
        self._put("teacher_logp", teacher_logp)
        self._put("log_ratio", first["old_logp"] - teacher_logp)
        sharding.reshard(student)
        sharding.reshard(teacher)

    def batch(self, step, batch, models, ref):
        """The record of an optimizer step without a rollout: of SFT, of pairs, of a reward model."""
        if not self.works:
            return
        with self._timed():
            (model,) = models
            if "examples" in batch:
                record = self._preferences(batch, model, ref)
            elif "rows" in batch:
                record = self._scores(batch["rows"], model)
            else:
                record = self._demonstrations(batch, model)
            sharding.reshard(model)
            self.append(pack({"step": step} | record))

    def _demonstrations(self, batch, model):
        some = trim(take_rows(batch, torch.arange(self._few(batch["lengths"].tolist()))))
        mask = some["mask"].bool()
        rows = self._named(some["tokens"], some["lengths"], mask)
        logp, entropy = model.logprobs(some["tokens"], mask)
        for i, (logp_row, entropy_row) in enumerate(zip(inside(logp, mask), inside(entropy, mask))):
            rows[i] |= {"finished": True, "logp": logp_row, "entropy": entropy_row}
        return {"rows": rows, "w": rounded(1 / float(batch["denom"]))}

    def _preferences(self, batch, model, ref):
        """Both responses of each pair under policy and reference, h = log π/π_ref summed over a response."""
        lengths = []
        for prompt, *both, _ in batch["examples"]:
            lengths.append(len(prompt) + max(map(len, both)))
        shown = []
        for prompt, first, second, liked in batch["examples"][: self._few_pairs(lengths)]:
            if batch["z0"] is not None:  # KTO: one response, liked or not
                shown.append((prompt, {"chosen" if liked else "rejected": first}))
            else:
                shown.append((prompt, {"chosen": first, "rejected": second}))
        rows, tokens, mask = self._responses(shown, model.device)
        logp, entropy = model.logprobs(tokens, mask)
        with at_work(ref):
            ref_logp, _ = ref.logprobs(tokens, mask)
            sharding.reshard(ref)
        log_ratio = logp - ref_logp
        h = log_ratio.sum(1).tolist()
        found = {"logp": logp, "ref_logp": ref_logp, "log_ratio": log_ratio, "entropy": entropy}
        found = {name: inside(x, mask) for name, x in found.items()}
        for i, row in enumerate(rows):
            row |= {name: values[i] for name, values in found.items()}
            row["h"] = rounded(h[i])
        z0 = None if batch["z0"] is None else rounded(batch["z0"].item())
        return {"rows": rows, "z0": z0}

    def _scores(self, examples, model):
        """What a reward model says after every token of the response; of a process one, the logit."""
        names = ("chosen", "rejected") if model.step_ids is None else ("response",)
        shown = [(prompt, dict(zip(names, ids))) for prompt, *ids in examples]
        lengths = [len(prompt) + max(map(len, responses.values())) for prompt, responses in shown]
        rows, tokens, mask = self._responses(shown[: self._few_pairs(lengths)], model.device)
        for row, values in zip(rows, inside(model.logits(tokens), mask)):
            row |= {"value": values, "score": values[-1]}
        return {"rows": rows}

    def _responses(self, shown, device):
        """[(prompt ids, {side: response ids})] → a row for each response, their tokens and mask (n, T)."""
        answers = []
        sides = []
        for i, (prompt, responses) in enumerate(shown):
            for side, response in responses.items():
                answers.append((prompt, response))
                sides.append({"pair": i, "side": side, "finished": True})
        tokens, lengths, mask = pad_responses(answers, device)
        rows = self._named(tokens, lengths, mask)
        return [row | side for row, side in zip(rows, sides)], tokens, mask

    def held_out(self, step, roll, score):
        """The responses to the first held-out prompts, before the first step and after the last."""
        if not self.works:
            return
        with self._timed():
            some = []
            for row, text, reward in list(zip(roll.rows, roll.texts, score.tolist()))[:HELD_OUT]:
                some.append({"prompt": str(row["prompt"]), "response": text, "reward": rounded(reward)})
            self.append(pack({"step": step, "held_out": some}))


def _before_whitening(tensors, gamma, lam):
    """PPO's δ_t = r_t + γ V_{t+1} − V_t, and the advantage before it was whitened, R_t − V_t: (n, T) each.

    The page explains the advantage as A_t = δ_t + γλ A_{t+1}. Where R_t − V_t is something else, as under a
    λ of the critic's own (variants/decoupled_gae.py), it is left out.
    """
    mask = tensors["mask"]
    value = tensors["old_value"]
    next_value = F.pad((value * mask)[:, 1:], (0, 1))  # 0 behind the last token
    delta = tensors["reward"] + gamma * next_value - value
    delta = delta * mask
    adv = (tensors["ret"] - value) * mask
    later = F.pad(adv[:, 1:], (0, 1))
    rounding = 1e-4 * (adv.abs() + value.abs()).max().item()
    if not torch.allclose(adv, delta + gamma * lam * later * mask, rtol=1e-4, atol=rounding):
        return {"delta": delta}
    return {"delta": delta, "adv_raw": adv}
