// What an application in JavaScript meets: one JSON object on standard output.
import OpenAI from "openai";

const { url, keys } = JSON.parse(process.env.SLUICE_TEST);
const messages = [{ role: "user", content: "Hello" }];
const ask = { model: "sim", messages, max_tokens: 5 };

function client(apiKey) {
  return new OpenAI({ apiKey, baseURL: `${url}/v1`, maxRetries: 0 });
}

async function refused(apiKey, request = ask) {
  try {
    await client(apiKey).chat.completions.create(request);
    return null;
  } catch (error) {
    return {
      is: error.constructor.name,
      status: error.status,
      code: error.code,
      retry_after: error.headers?.get("retry-after") ?? null,
    };
  }
}

const { data, response } = await client(keys.user).chat.completions.create(ask).withResponse();
let streamed = "";
for await (const chunk of await client(keys.user).chat.completions.create({ ...ask, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
console.log(
  JSON.stringify({
    whole: data.choices[0].message.content,
    streamed,
    remaining: response.headers.get("x-ratelimit-remaining-requests"),
    models: (await client(keys.user).models.list()).data.map((model) => model.id),
    wrong: await refused("sk-wrong"),
    narrow: await refused(keys.narrow),
    spent: [await refused(keys.spent), await refused(keys.spent)],
  }),
);
