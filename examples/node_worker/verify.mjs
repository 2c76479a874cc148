// Is this request a task of a deferlib engine? Its dispatch token proves it; nothing else of it can be believed.
//
// Start at `verify`. Byte for byte, the token and its keys are in docs/reference/formats.md of deferlib. Node 18.3 or
// newer, and nothing but its standard library: copy this file into your own worker.

import { createHash, createHmac, hkdfSync, randomBytes, timingSafeEqual } from "node:crypto";
import { readFileSync, statSync } from "node:fs";

const HEADER = "x-deferlib-signature";
const FORGEABLE = ["x-appengine", "x-cloudtasks", "x-deferlib"];
const SKEW = 600_000_000; // microseconds that the clocks of engine and worker may differ
const MAX_TOKEN = 16_384;
const MAX_QUERY = 200; // a longer query is vouched for by its digest
const MAX_BODY = 32 * 1024 * 1024 + 64 * 1024; // no task is longer, unless deferlib's setting `limits` was raised
const MIN_SECRET = 16;
const NO_KEY = randomBytes(32); // an unknown key costs the same work as a known one

/** The request isn't one that an engine has made, or not for this worker. Its message tells no secrets. */
export class Untrusted extends Error {}

/**
 * Return the task that *request* (an http.IncomingMessage) is an attempt of, and its body; throw `Untrusted` if it is none.
 *
 * Afterwards, in any case, the headers of the request that only an engine may set are true. *prefix* is a path that a
 * proxy strips on the way; *now* is in microseconds since 1970.
 */
export async function verify(request, keys, { prefix = "", now = Date.now() * 1000 } = {}) {
  const tokens = takeForgeable(request).filter(([name]) => name === HEADER);
  if (tokens.length !== 1) {
    throw new Untrusted(tokens.length ? "there is more than one dispatch token" : "there is no dispatch token");
  }
  const claims = readToken(tokens[0][1], keys, now); // before the body: nobody else's is worth reading
  const query = checkTarget(claims, request.method, request.url, prefix);
  const body = await readBody(request);
  if (sha256(body) !== claims.b) {
    throw new Untrusted("the token is for another body");
  }
  for (const [name, value] of Object.entries(claims.h)) {
    request.headers[name.toLowerCase()] = value;
    request.headersDistinct[name.toLowerCase()] = [value];
    request.rawHeaders.push(name, value);
  }
  return { task: taskOf(claims, query), body };
}

// --- keys ------------------------------------------------------------------------------------------------------------

/**
 * Return the dispatch keys by their ids, from the first of these variables that is set:
 *
 * - DEFERLIB_DISPATCH_KEYS: derived keys, `id:key` in hex. With them nobody can sign a payload.
 * - DEFERLIB_KEY: the signing keys themselves.
 * - DEFERLIB_KEY_FILE: the path of the key file beside deferlib's store.
 *
 * Each may hold several, separated by commas or line breaks: while keys are replaced, two are in use.
 */
export function keysFrom({ DEFERLIB_DISPATCH_KEYS: derived, DEFERLIB_KEY: secrets, DEFERLIB_KEY_FILE: path }) {
  const keys = derived ? split(derived).map(parseDerived) : split(secrets || (path ? readKeyFile(path) : "")).map(derive);
  if (keys.length === 0) {
    throw new Error("there is no key: set DEFERLIB_DISPATCH_KEYS, DEFERLIB_KEY or DEFERLIB_KEY_FILE");
  }
  return new Map(keys);
}

function derive(secret, index) {
  if (secret.length < MIN_SECRET) {
    throw new Error(`signing key ${index + 1} has ${secret.length} bytes, at least ${MIN_SECRET} are needed`);
  }
  const hkdf = (info, length) => Buffer.from(hkdfSync("sha256", secret, Buffer.alloc(32), info, length));
  return [hkdf("deferlib/key-id/1", 8).toString("hex"), hkdf("deferlib/dispatch/1", 32)];
}

function parseDerived(text, index) {
  const match = /^([0-9a-f]{16}):([0-9a-f]{64})$/.exec(text.toString("latin1"));
  if (!match) {
    throw new Error(`DEFERLIB_DISPATCH_KEYS: key ${index + 1} isn't 16 hex digits, a colon and 64 hex digits`);
  }
  return [match[1], Buffer.from(match[2], "hex")];
}

function readKeyFile(path) {
  if (statSync(path).mode & 0o077) {
    throw new Error(`${path}: others can read the signing keys; run \`chmod 600 ${path}\``);
  }
  return readFileSync(path);
}

/** Split a list of keys, text or bytes, into the bytes of each. As Latin-1 every byte stays what it is. */
function split(list) {
  const lines = Buffer.from(list).toString("latin1").split(/[\r\n]/); // those that begin with "# " are comments
  const parts = lines.filter((line) => !line.startsWith("# ")).flatMap((line) => line.split(","));
  return parts.map((part) => Buffer.from(part.replace(/^[ \t]+|[ \t]+$/g, ""), "latin1")).filter((part) => part.length);
}

// --- the request -----------------------------------------------------------------------------------------------------

/** Take the headers that only an engine may set away from *request*, in any spelling; return them, with small letters. */
function takeForgeable(request) {
  const taken = [];
  const kept = [];
  for (let at = 0; at < request.rawHeaders.length; at += 2) {
    const [name, value] = request.rawHeaders.slice(at, at + 2);
    if (isEngines(name)) {
      taken.push([name.toLowerCase(), value]);
    } else {
      kept.push(name, value);
    }
  }
  for (const headers of [request.headers, request.headersDistinct]) { // Node makes both of the raw ones, when first read
    for (const name of Object.keys(headers).filter(isEngines)) {
      delete headers[name];
    }
  }
  request.rawHeaders = kept;
  return taken;
}

function isEngines(name) {
  const folded = name.trim().toLowerCase().replaceAll("_", "-"); // many servers and proxies take both for the same
  return FORGEABLE.some((prefix) => folded.startsWith(prefix));
}

/** Return the claims of *token* if its signature and its time hold. */
function readToken(token, keys, now) {
  const parts = token.split(".");
  if (token.length > MAX_TOKEN || !/^[\x20-\x7e]*$/.test(token) || parts.length !== 4 || parts[0] !== "v1") {
    throw new Untrusted("the token has an unknown format");
  }
  const [version, id, encoded, signature] = parts;
  const key = keys.get(id);
  const expected = createHmac("sha256", key ?? NO_KEY).update(`${version}.${id}.${encoded}`).digest("base64url");
  const genuine = sameText(expected, signature); // as text: decoding ignores the spare bits of the last character
  if (!key) {
    throw new Untrusted("the token was signed with a key that isn't known here");
  }
  if (!genuine) {
    throw new Untrusted("the token's signature is wrong");
  }
  const claims = JSON.parse(Buffer.from(encoded, "base64url").toString("utf8")); // the engine's, since the signature holds
  if (!(claims.t - SKEW <= now && now <= claims.t + claims.l + SKEW)) {
    throw new Untrusted("the token has expired, or the clocks differ by more than ten minutes");
  }
  return claims;
}

function sameText(one, other) {
  return one.length === other.length && timingSafeEqual(Buffer.from(one, "latin1"), Buffer.from(other, "latin1"));
}

/** Compare method, path and query with what is vouched for; return the query. */
function checkTarget(claims, method, url, prefix) {
  if (claims.m !== method) {
    throw new Untrusted(`the token is for a ${claims.m} request`);
  }
  const [path, query] = cut(url);
  const sent = decoded(claims.o + cut(claims.u)[0]);
  if (sent !== decoded(path) && sent !== decoded(prefix + path)) {
    throw new Untrusted("the token is for another path");
  }
  const long = query.length > MAX_QUERY;
  if (claims.q !== (long ? "" : query) || claims.r !== (long ? sha256(query) : "")) {
    throw new Untrusted("the token is for another query");
  }
  return query;
}

function cut(url) {
  const mark = url.indexOf("?");
  return mark < 0 ? [url, ""] : [url.slice(0, mark), url.slice(mark + 1)];
}

/** Percent-decode a path to its bytes, as a string of one character a byte: proxies encode more or less than was sent. */
function decoded(path) {
  return path.replace(/%([0-9a-f]{2})/gi, (_, digits) => String.fromCharCode(parseInt(digits, 16)));
}

/** Read the body, of which no more than a task's longest is ever in memory. */
async function readBody(request) {
  if (Number(request.headers["content-length"] ?? 0) > MAX_BODY) {
    throw new Untrusted(`the body has more than ${MAX_BODY} bytes`);
  }
  const chunks = [];
  let length = 0;
  for await (const chunk of request) {
    length += chunk.length;
    if (length > MAX_BODY) {
      throw new Untrusted(`the body has more than ${MAX_BODY} bytes`); // ends the connection: no engine sends that
    }
    chunks.push(chunk);
  }
  return Buffer.concat(chunks);
}

function sha256(data) {
  return createHash("sha256").update(data).digest("hex");
}

function taskOf(claims, query) {
  return {
    id: claims.i, // a string: it has up to 63 bits, more than a number of JavaScript holds
    name: claims.n || claims.i, // the same in every attempt
    queue: claims.d,
    namespace: claims.s,
    path: cut(claims.u)[0], // the task's own, percent-encoded, without the path of the target's base URL
    url: claims.u + query,
    attempt: claims.a, // from 1
    executions: claims.x, // earlier attempts that this worker answered, or didn't answer by the deadline
    fence: claims.f, // greater with every attempt of the task
    eta: new Date(claims.e / 1000),
    deadline: new Date((claims.t + claims.l) / 1000), // when the engine gives this attempt up
  };
}
