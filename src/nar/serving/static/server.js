/** The routes of the server: requests, their events, and its errors as it says them.
 *
 * Knows HTTP alone; does not know the page. Paths are relative, so a server behind a prefix works.
 */

const KEY = "nar.key"; // of sessionStorage: gone with the tab

/** An answer of the server's that is an error: its own words, and when it may be asked again. */
export class Refused extends Error {
  constructor(message, status = 0, retrySeconds = null) {
    super(message);
    this.status = status;
    this.retrySeconds = retrySeconds;
  }
}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** Ask for a path; `body` is sent as a form, or as JSON. Throws Refused for every answer that is no success. */
export async function ask(path, { body, method = body === undefined ? "GET" : "POST", signal } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const isForm = body instanceof FormData;
  if (body !== undefined && !isForm) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: isForm ? body : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server can't be reached. Is it still running?");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  const wait = parseFloat(response.headers.get("retry-after-ms")) / 1000;
  const message = said.error?.message ?? `The server answered ${response.status}.`;
  throw new Refused(message, response.status, Number.isFinite(wait) ? wait : null);
}

/** The events of an answer as objects; EventSource can't send a body. Throws Refused for an event of an error. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Refused("The connection to the server broke before the answer was whole.");
    });
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6));
      if (!data.length) continue; // a comment that keeps the connection
      const event = JSON.parse(data.join("\n"));
      if (event.type === "error") throw new Refused(event.error.message);
      yield event;
    }
  }
}

/** How many requests wait for a model, as /metrics says; null where it does not. */
export async function numWaiting(model, signal) {
  const text = await (await ask("metrics", { signal })).text();
  for (const line of text.split("\n")) {
    if (line.startsWith("nar_requests_waiting") && line.includes(`"${model}"`)) return Number(line.split(" ").at(-1));
  }
  return null;
}

/** Wait, unless the signal ends it. */
export function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    }, { once: true });
  });
}
