"""Entry points, through which other packages add methods and weight formats."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import threading


class EntryPoints:
    """The modules of one entry-point group. Importing a module registers what it defines.

    Args:
        group: the name of the group, such as "lora_init.initializers".
        package: a package of this library whose modules are imported first, or None.
    """

    def __init__(self, group: str, package: str | None = None) -> None:
        self.group = group
        self.package = package
        self.loaded: bool | None = False  # None while the modules are being imported
        # Reentrant, because an imported module may use the registry that it extends.
        self._loading = threading.RLock()

    def load(self) -> None:
        """Import the modules, once. After a failure, the next call tries again.

        Raises:
            ImportError: the module of an entry point fails; the message names its package.
        """
        if self.loaded is True:
            return
        with self._loading:
            if self.loaded is not False:  # another thread loaded, or a module below called this
                return
            self.loaded = None
            try:
                if self.package is not None:
                    import_modules(self.package)
                for entry in importlib.metadata.entry_points(group=self.group):
                    self._import(entry)
            except BaseException:
                self.loaded = False
                raise
            self.loaded = True

    def _import(self, entry: importlib.metadata.EntryPoint) -> None:
        try:
            entry.load()
        except Exception as error:
            package = entry.dist.name if entry.dist else "an unknown package"
            raise ImportError(
                f"entry point {entry.name!r} of {package} in {self.group} cannot be loaded: "
                f"{entry.value} raised {type(error).__name__}: {error}. Correct or uninstall "
                "that package."
            ) from error


def import_modules(package: str) -> None:
    """Import every module of a package, in the order of their names."""
    found = importlib.import_module(package)
    for module in pkgutil.iter_modules(found.__path__):
        importlib.import_module(f"{package}.{module.name}")
