"""Tables, figures and pages built from run.json alone; nothing here loads torch.

`edgemin.report.write` is the way in: `write_job`, `write_study`, `rebuild`, `print_job`, `print_study`.
"""
