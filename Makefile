.PHONY: style quality test docs

style:
	ruff format .
	ruff check --fix .

quality:
	ruff format --check .
	ruff check .
	mypy
	lint-imports

test:
	python -m pytest

docs:
	python -m library.options_doc
