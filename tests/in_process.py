"""A papermill engine that runs a notebook's cells in this process: imports are paid once, and tests can replace functions."""

import matplotlib.pyplot as plt
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from papermill.engines import Engine, papermill_engines


class InProcess(Engine):
    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **kwargs):
        shell = InteractiveShell()
        try:
            for index, cell in enumerate(nb_man.nb.cells):
                nb_man.cell_start(cell, index)
                if cell.cell_type == "code":
                    with capture_output():
                        result = shell.run_cell(cell.source, store_history=True)
                    plt.close("all")
                    result.raise_error()
                nb_man.cell_complete(cell, cell_index=index)
        finally:
            shell.history_manager.end_session()
            shell.restore_sys_module_state()


papermill_engines.register("in-process", InProcess)
