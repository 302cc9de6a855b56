"""Version of this package, and of what its figures depend on."""

__version__ = "0.1.0"


def library_versions() -> dict[str, str]:
    """Versions of Python, NumPy, SciPy and PyTorch."""
    import importlib.metadata
    import platform

    libraries = {name: importlib.metadata.version(name) for name in ("numpy", "scipy", "torch")}
    return {"python": platform.python_version(), **libraries}
