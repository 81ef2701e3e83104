"""Train in a plain PyTorch loop under a plan.

python examples/plain_loop.py MODEL MANIFEST FOLDER STEPS

MODEL is anything that canter.load takes. To resume, run it again with more STEPS. FOLDER/model is the trained model.
"""

import sys
from pathlib import Path

import torch

import canter
from canter.integrations.loop import MicroBatches, collate, merge_pending


class Clips(MicroBatches):
    def __getitem__(self, row):
        try:
            return self.example(self.index.utterance(row), row)
        except ValueError as error:  # audio that cannot be read
            print(f"left out: {error}", flush=True)


start, manifest, folder, steps = *map(Path, sys.argv[1:4]), int(sys.argv[4])
saved = torch.load(folder / "state.pt", weights_only=True) if (folder / "state.pt").exists() else None
recognizer = canter.load(folder / "model" if saved else start, device="cpu", precision="float32")
model = recognizer.module.train()
if model.padded_seconds:
    model.set_features(pad_seconds=0.0)  # a Whisper at the utterances' lengths instead of 30 s each
index = canter.build_index(manifest, folder / "lengths.arrow", tokenizer=model.tokenizer, progress=False)
budget = canter.Budget.from_batch_seconds(30.0, frame_seconds=model.frame_seconds)
plan = canter.Plan(index, budget, longest_seconds=model.longest_seconds, most_tokens=model.positions)
for row, reason in plan.left_out():
    print(f"left out: row {row}: {reason}", flush=True)
sampler = canter.PlanSampler(plan)
clips = Clips(index, model.tokenizer, None, model.sample_rate)
padded = lambda rows: collate([one for one in rows if one], model.tokenizer.pad) if any(rows) else None  # noqa: E731
loader = torch.utils.data.DataLoader(clips, batch_sampler=sampler, collate_fn=padded)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
step = 0
if saved:
    step = saved["step"]
    optimizer.load_state_dict(saved["optimizer"])
    sampler.load_state_dict(saved["sampler"])
while step < steps:  # a pass over the loader is an epoch, or the remainder of one
    for batch in sampler.follow(loader):
        if step == steps:
            break
        if batch is None:  # none of its audio could be read
            continue
        torch.manual_seed(step)
        sums = model.loss(batch)
        loss = sums.attention / sums.attention_count
        loss.backward()
        merge_pending(model)  # BatchNorm's running statistics, once a step
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        print(f"step {step}: {len(batch.rows)} utterances, loss {loss.item():.4f}", flush=True)
recognizer.save(folder / "model")
state = {"step": step, "optimizer": optimizer.state_dict(), "sampler": sampler.state_dict()}
torch.save(state, folder / "state.pt")
