"""Have the worker in Node render invoices: one task an order. Run it as often as you like."""

from deferlib import taskqueue

ORDERS = (
    {"order": "1001", "customer": "Ada Lovelace", "cents": "123450"},
    {"order": "1002", "customer": "Gödel & Söhne", "cents": "4200"},
    {"order": "1003", "customer": "Grace Hopper", "cents": "99"},
    {"order": "1004", "customer": "Charles Babbage", "cents": "a lot"},  # no retry will make a number of it
)


def bill(order: dict[str, str]) -> str:
    """Add the task that renders the invoice of *order*, unless it was added before; say which it was."""
    name = f"invoice-{order['order']}"
    try:
        taskqueue.add(url="/invoice", params=order, target="node", name=name, queue_name="invoices")
    except (taskqueue.TaskAlreadyExistsError, taskqueue.TombstonedTaskError):
        return f"{name}: added before"
    return f"{name}: added"


if __name__ == "__main__":
    for each in ORDERS:
        print(bill(each))
