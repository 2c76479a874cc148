// A web server in Node that renders invoices, one task of a deferlib engine each. See README.md.
//
// Environment: PORT (8090), INVOICES (the folder they are written to), FAIL_FIRST=1 (be busy at each task's first
// attempt, to show what a retry looks like), DEFERLIB_PREFIX, and the keys: see `keysFrom` in verify.mjs.

import { mkdir, rename, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import { join } from "node:path";

import { keysFrom, Untrusted, verify } from "./verify.mjs";

const { PORT = "8090", INVOICES = "invoices", FAIL_FIRST = "", DEFERLIB_PREFIX = "" } = process.env;

class Busy extends Error {} // try again later
class PermanentFailure extends Error {} // trying again is no use

const work = new Map([["/invoice", renderInvoice]]);

/** Write one invoice. Twice does the same as once: the file has the task's name, and appears whole. */
async function renderInvoice(task, body) {
  if (FAIL_FIRST && task.executions === 0) {
    throw new Busy("the printer is warming up");
  }
  const { order, customer, cents } = Object.fromEntries(new URLSearchParams(body.toString()));
  if (!/^[0-9]{1,12}$/.test(cents)) {
    throw new PermanentFailure(`order ${order}: cents is ${cents}, a whole number is needed`);
  }
  const total = new Intl.NumberFormat("en", { style: "currency", currency: "EUR" }).format(cents / 100);
  const text = `Invoice for order ${order}\n\nTo: ${customer}\nTotal: ${total}\n`;

  const draft = join(INVOICES, `.${task.name}.${task.fence}`); // of this attempt only: an older one may still be at work
  await writeFile(draft, text, { flush: true });
  await rename(draft, join(INVOICES, `${task.name}.txt`));
}

// --- from the request to the answer ----------------------------------------------------------------------------------

/** Return what the engine is told: status, outcome, and a line for people. */
async function answer(request) {
  let what = `${request.method} ${request.url}`;
  let said = [200, "ok", "done"];
  try {
    const { task, body } = await verify(request, keys, { prefix: DEFERLIB_PREFIX });
    what = `${task.name}, attempt ${task.attempt}`;
    const run = request.method === "POST" && work.get(task.path); // the path of the token: proxies may respell the other
    if (run) {
      await run(task, body);
    } else {
      said = [404, "", `nothing here takes a ${request.method} of ${task.path}`];
    }
  } catch (error) {
    said = failure(error);
  }
  console.log(`${what}: ${said.join(" ")}`);
  return said;
}

function failure(error) {
  if (error instanceof Untrusted) return [403, "untrusted", error.message];
  if (error instanceof PermanentFailure) return [200, "permanent", error.message];
  if (error instanceof Busy) return [503, "retry", error.message];
  console.error(error);
  return [500, "retry", error.message];
}

const keys = keysFrom(process.env); // before anything listens: without a key every task would be refused
await mkdir(INVOICES, { recursive: true });

// A token has up to 16 KiB, which is all that Node takes for all headers together, unless it is told.
const server = createServer({ maxHeaderSize: 32 * 1024 }, async (request, response) => {
  const [status, outcome, text] = await answer(request);
  response.writeHead(status, {
    "Content-Type": "text/plain; charset=utf-8",
    ...(outcome ? { "X-Deferlib-Outcome": outcome } : {}),
    ...(request.readableEnded ? {} : { Connection: "close" }), // don't read on what nobody wants
  });
  response.end(`${text.slice(0, 160)}\n`);
});
server.listen(Number(PORT), "127.0.0.1", () => console.log(`listening on http://127.0.0.1:${server.address().port}`));

for (const signal of ["SIGTERM", "SIGINT"]) {
  process.once(signal, () => server.close()); // finishes what runs; a second signal ends at once
}
