"""One study from its configuration to run.json: the models it names, order, plan, execution, scoring, results."""
