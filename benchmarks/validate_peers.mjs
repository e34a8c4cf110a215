// Drizzle's and Better Auth's part in validate.py, which runs this as an expression in examples/better-auth, so that
// imports are found there. A line of standard input is a round, {"peer": name, "tokens": [a list for each task]}; the
// answer is a line, {"elapsed": nanoseconds, "delays": [nanoseconds, one figure a check]}.
import { serializeSignedCookie } from "better-call";
import { and, eq, gt, sql } from "drizzle-orm";
import { drizzle } from "drizzle-orm/node-postgres";
import { createHash } from "node:crypto";
import { createInterface } from "node:readline";
import { Pool } from "pg";
import { auth, pool as authPool } from "./auth.ts";
import { sessions, users } from "./schema.ts";

const pool = new Pool({ connectionString: process.env.DATABASE_URL, max: Number(process.env.CONNECTIONS) });
const db = drizzle(pool);
const { authCookies, secret } = await auth.$context;

const digest = (token) => "k1$" + createHash("sha256").update(token).digest("hex");
const select = (token, now) => db.select().from(sessions).innerJoin(users, eq(users.id, sessions.userId))
  .where(and(eq(sessions.token, token), gt(sessions.expiresAt, now)));
const prepared = select(sql.placeholder("token"), sql.placeholder("now")).prepare("validate");

// A peer makes of a token what a request brings, which is not timed, and checks that.
const asItIs = (token) => token;
const peers = {
  "drizzle": {
    bring: asItIs,
    check: async (token) => (await select(digest(token), new Date()))[0],
  },
  "drizzle prepared": {
    bring: asItIs,
    check: async (token) => (await prepared.execute({ token: digest(token), now: new Date().toISOString() }))[0],
  },
  // Better Auth looks up what the cookie says, so the cookie has the digest, as the column does.
  "better auth": {
    bring: async (token) => {
      const line = await serializeSignedCookie(authCookies.sessionToken.name, digest(token), secret);
      return new Headers({ cookie: line.split(";")[0] });
    },
    check: (headers) => auth.api.getSession({ headers }),
  },
};

async function play({ peer, tokens }) {
  const { bring, check } = peers[peer];
  const brought = await Promise.all(tokens.map((some) => Promise.all(some.map(bring))));
  const delays = [];
  const ask = async (some) => {
    for (const one of some) {
      const before = process.hrtime.bigint();
      if (!(await check(one))) throw new Error(`${peer} found no session`);
      delays.push(Number(process.hrtime.bigint() - before));
    }
  };
  const start = process.hrtime.bigint();
  await Promise.all(brought.map(ask));
  return { elapsed: Number(process.hrtime.bigint() - start), delays };
}

for await (const line of createInterface({ input: process.stdin })) {
  console.log(JSON.stringify(await play(JSON.parse(line))));
}
await Promise.all([pool.end(), authPool.end()]);
