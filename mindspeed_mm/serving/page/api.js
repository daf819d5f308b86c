// The server's protocol: the names of its models, and an answer piece by piece.
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

function headers(token) {
  return { "Content-Type": "application/json", ...(token ? { Authorization: `Bearer ${token}` } : {}) };
}

async function checked(response) {
  if (response.ok) return response;
  const text = await response.text();
  let message = text.slice(0, 300) || `HTTP ${response.status}`;
  try {
    message = JSON.parse(text).error.message;
  } catch (error) {
    console.warn("the error has no form of the protocol", error);
  }
  throw new ServerError(message, response.status);
}

export async function modelNames(token) {
  const response = await checked(await fetch("/v1/models", { headers: headers(token) }));
  return (await response.json()).data.map((model) => model.id);
}

/** Pieces of the answer: {text, tokens}, tokens in the last one. `signal` ends it; the server sees the connection close and stops, too. */
export async function* streamAnswer(body, token, signal) {
  const streamed = JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } });
  const request = { method: "POST", headers: headers(token), body: streamed, signal };
  const response = await checked(await fetch("/v1/chat/completions", request));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ServerError("the connection ended before the answer", 0);
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: ?/, "");
      if (data === "[DONE]") return;
      const found = JSON.parse(data);
      if (found.error) throw new ServerError(found.error.message, 0);
      const [text, tokens] = [found.choices[0]?.delta?.content ?? "", found.usage?.completion_tokens];
      if (text || tokens) yield { text, tokens };
    }
  }
}
