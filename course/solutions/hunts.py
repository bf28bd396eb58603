"""What a good answer to each hunt of the weeks says: the evidence, the line, and how a test would find it."""

ANSWERS = {
    1: "The loss goes far below that of the right run, and below the entropy of the demonstrations (the "
    "digit of a guess cannot be predicted): the model must see what it predicts. hidden[t] has read "
    "token t, so that scoring token t from it is copying. The shift `tokens[:, :-1]` in hidden_before "
    "is missing. A test: the log-prob of a token is the same when it is scored from the tokens before "
    "it alone.",
    2: "`len` is one token lower than in the right run, and no sample ends: EOS is outside the mask and "
    "never learnt. The mean loss is a little higher, because an easy token is missing from it. The "
    "place is encode_demonstration in data.py. A test: the mask of a demonstration has as many tokens "
    "as the response with its EOS.",
    3: "`acc` falls below one half and `margin` goes negative while the loss falls: the loss is lowered by "
    "preferring the rejected response. −log σ(chosen − rejected) has become −log σ(rejected − chosen). "
    "A test: the derivative at a margin of 0 is −½ for the chosen reward.",
    4: "`reward` falls from the first step and `entropy` rises, because likely tokens with a positive "
    "advantage are made less likely; in the right run it falls. The whitened advantage has a minus. A "
    "test: after one step on one sample with A > 0 its log-prob is higher.",
    5: "At step 0 `reward` is near chance (0.1) and `eval/reward` at 0.4, for the same policy: training "
    "scores responses by other prompts. `rows * n` repeats the list of prompts, while the samples of "
    "one prompt are neighbours. It learns because one sample in sixteen meets its own prompt, and the "
    "rest is noise around a baseline. A test: the prompt ids in the tokens are those of the row that "
    "judges.",
    6: "`gap` is large and `ratio_max` not 1 in the very first minibatch, only at a temperature other than "
    "1: the sampler ignores the temperature, draws and scores at 1, and the trainer scores at 0.6. "
    "`draw` uses the logits without the division. A test: the log-prob that is returned is that of "
    "softmax(logits / T), and the ratio of the first minibatch is 1.",
    7: "`critic_gnorm` is 0, `explained_var` stays exactly 0, and `value_loss` rises with the reward, "
    "because the critic says 0 everywhere, as it did at the start. The reward rises nevertheless: the "
    "advantages are then rewards without a baseline, right in the mean and noisy. The critic's loss is "
    "multiplied by 0 where the two are added. A test: the critic's weights change in a step, and its "
    "loss falls on one rollout.",
    8: "`gnorm` never becomes small, and grows over updates, because gradients add up: each step goes "
    "along the sum of all that were. opt.zero_grad() is missing. A test: two steps with the same data "
    "and learning rate 0 have the same gradient norm.",
    9: "`kl` is above that of the right run and goes on rising, although the penalty is on: the policy is "
    "paid for its distance. The penalty −beta (logp − ref_logp) has its terms exchanged. A test: the "
    "rewards of a row sum to the score minus beta times the log-ratio.",
    10: "Only `reward_se` differs, and it is too small: it treats 512 samples as independent, although the "
    "sixteen of one prompt share its difficulty. √(p(1 − p)/512) with the reward p of the step is what "
    "the column says. The mean over each prompt's samples is left out in mean_se. A consequence: "
    "differences between runs look significant that are not. A test: repeating each sample sixteen "
    "times must not shrink the error.",
    11: "`gnorm` at step 0 is 0.6 times that of the right run, while every figure of the forward pass is "
    "the same: the gradient lacks the factor 1/T. The curves hardly differ because Adam divides by the "
    "gradient's size; what remains is the clipping by norm. A test: finite differences, at a "
    "temperature other than 1.",
    12: "`kl` rises from the first step: tokens that the teacher likes less are rewarded. The advantage is "
    "log q − log p, and the two are exchanged. A test: the expected gradient is that of the exact "
    "reverse KL, by enumeration of the vocabulary.",
}
