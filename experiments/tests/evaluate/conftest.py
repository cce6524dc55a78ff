from experiments.tests.evaluate.small_weights import hub  # noqa: F401 - a fixture
