"""`python -m tolaria.drill.campaign`: thousands of short trainings, each with one kind of fault, each judged alone.

`strokes` says how a fault strikes, `acts` what it does, `kinds` which ones there are; `trial` is one training with its
judgement, `outcome` what the judgement means; `campaign` runs many, `tally` counts, `page` puts them into
docs/campaign.md.
"""
