"""Code for a module that may never be imported: it runs right after the first import, and costs nothing before."""

import sys
from importlib.abc import MetaPathFinder


def after_import(name, action):
    """Call action() as soon as the module `name` is imported, which may be now. A module has one action, the last."""
    if sys.modules.get(name) is not None:  # None stands for a module that must not be found
        action()
    else:
        sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "watched", None) != name]
        sys.meta_path.insert(0, _Watch(name, action))


class _Watch(MetaPathFinder):
    """Finds nothing itself: asks the other finders, and has the loader that they answer with call the action."""

    def __init__(self, name, action):
        self.watched, self._action = name, action

    def find_spec(self, name, path=None, target=None):
        if name != self.watched:
            return None
        finders = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                if self in sys.meta_path:  # a module that is loaded again has had its action
                    sys.meta_path.remove(self)
                    self._action()

            spec.loader.exec_module = exec_module
        return spec
