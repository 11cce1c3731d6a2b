"""COOL RLHF: three rounds of InternLM2-20B, its reward model patched between them with labels of people.

Round one trains against the reward model of internlm2_20b_reward_qlora. The report has three rounds, 20 to 100 pairs
for each hacking pattern, and thousands of patches in all; the number of steps is that of internlm2_20b_ppo.
"""

from tuner.config import COOL, Candidates, People, Round, load_config

config = COOL(
    reward=load_config("internlm2_20b_reward_qlora"),
    policy=load_config("internlm2_20b_ppo"),
    rounds=(Round(steps=400), Round(steps=400), Round(steps=400)),
    candidates=Candidates(prompts=1_000, answers=2, slow=1_000, fast=100, patterns=5),
    # tuner label runs/internlm2_20b_cool; a judge in their place: Judge(url="http://localhost:8000/v1", model="...")
    feedback=(People(overlap=2),),
)
