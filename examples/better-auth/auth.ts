import { betterAuth } from "better-auth";
import { drizzleAdapter } from "better-auth/adapters/drizzle";
import { drizzle } from "drizzle-orm/node-postgres";
import { Pool } from "pg";
import * as schema from "./schema";

export const pool = new Pool({ connectionString: process.env.DATABASE_URL });

export const auth = betterAuth({
  baseURL: process.env.BETTER_AUTH_URL,
  secret: process.env.BETTER_AUTH_SECRET, // KITROCKET_BETTER_AUTH_SECRET has the same
  database: drizzleAdapter(drizzle(pool), { provider: "pg", schema, transaction: true }),
  user: { modelName: "users", fields: { image: "avatar" } },
  session: {
    modelName: "sessions",
    expiresIn: 60 * 60 * 24 * 7, // KITROCKET_SESSION_TTL
    updateAge: 60 * 60 * 24, // KITROCKET_SESSION_UPDATE_AGE
    cookieCache: { enabled: false }, // it would outlive a revocation
  },
  account: {
    modelName: "accounts",
    fields: { providerId: "provider", accountId: "providerAccountId", accessTokenExpiresAt: "expiresAt" },
  },
  emailAndPassword: { enabled: true },
});
