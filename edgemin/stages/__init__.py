"""The stages a path is made of; each is one class behind the contract of :mod:`edgemin.stages.base`."""
