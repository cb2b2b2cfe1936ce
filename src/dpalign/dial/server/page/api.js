// The server's API: requests, the key, errors, and streamed answers.

const KEY = "dpalign-key";

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

// A key lives as long as the tab: never in the address, never on disk.
export const key = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: (text) => (text ? sessionStorage.setItem(KEY, text) : sessionStorage.removeItem(KEY)),
};

async function call(path, body, signal) {
  const headers = {};
  if (body) headers["Content-Type"] = "application/json";
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  const options = { method: body ? "POST" : "GET", headers, signal, cache: "no-store" };
  if (body) options.body = JSON.stringify(body);
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer.", 0);
  }
  if (!response.ok) throw new ApiError(await said(response), response.status);
  return response;
}

async function said(response) {
  const text = await response.text();
  try {
    const { error, detail } = JSON.parse(text);
    return String(error?.message ?? error ?? detail ?? text);
  } catch {
    return text.slice(0, 300) || `The server answered ${response.status}.`;
  }
}

export const dial = async () => (await call("v1/dial")).json();

// The rewards of an answer by objective; null where the server has no reward model.
export async function rewards(messages, response, signal) {
  try {
    return (await (await call("v1/rewards", { messages, response }, signal)).json()).rewards;
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

// A person's direction, from choices between answers: [{preferred, other}], by their rewards.
export const taste = async (choices) => (await call("v1/taste", { choices })).json();

// Yields the parts of an answer as they come: {text}, {warnings}, {chosen} (how the best of several was chosen), {finish}.
export async function* chat(body, signal) {
  const response = await call("v1/chat/completions", { ...body, stream: true }, signal);
  const header = response.headers.get("x-dpa-warning"); // the same in ASCII, for servers that send no field
  let [first, finished] = [true, false];
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(String(chunk.error.message ?? chunk.error), 500);
    if (header && first && !chunk.warnings) yield { warnings: [header] };
    first = false;
    if (chunk.warnings?.length) yield { warnings: chunk.warnings.map(String) };
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (chunk.best_of) yield { chosen: chunk.best_of };
    if (choice?.finish_reason) {
      finished = true;
      yield { finish: choice.finish_reason };
    }
  }
  if (!finished) throw new ApiError("The answer broke off: the connection was lost.", 0);
}

// The data of server-sent events, one string an event.
async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      held += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const whole = held.split(/\r?\n\r?\n/);
      held = whole.pop();
      for (const event of whole) {
        const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
