"""``make gpu``: all that needs a CUDA card, in one command of at most nine minutes and without a network.

``session`` keeps the time and writes gpu.json; ``stages`` and ``paging`` say what is measured; ``lab``, ``speed`` and
``peft`` are the processes in which it is.
"""
