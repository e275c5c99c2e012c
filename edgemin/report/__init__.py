"""Tables, figures and pages built from run.json alone; nothing here loads torch.

`edgemin.report.write` is the way in: `of_job`, `of_study`, `rebuild`.
"""
