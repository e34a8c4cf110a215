"""What ``kitrocket doctor --drizzle`` prints: what keeps ``drizzle-kit push`` from undoing what kitrocket added.

``drizzle-kit push`` drops the indexes and tables of schema ``public`` that its schema does not declare, and switches
row-level security off where it is not declared.
"""

from __future__ import annotations

SCHEMA = """\
import { sql } from "drizzle-orm";
import { index, integer, pgTable, serial, text, timestamp, uniqueIndex, varchar } from "drizzle-orm/pg-core";

// users, after its columns:
(t) => [
  uniqueIndex("users_lower_email_idx").on(sql`lower(${t.email})`),
]).enableRLS();

// sessions:
(t) => [
  index("sessions_expires_at_idx").on(t.expiresAt),
  index("sessions_user_id_idx").on(t.userId),
]).enableRLS();

// accounts:
(t) => [
  index("accounts_user_id_idx").on(t.userId),
  uniqueIndex("accounts_provider_provider_account_id_idx").on(t.provider, t.providerAccountId),
]).enableRLS();

// subscriptions:
(t) => [
  uniqueIndex("subscriptions_one_live_per_user").on(t.userId)
    .where(sql`${t.status} IN ('active', 'trialing', 'past_due')`),
  index("subscriptions_user_id_idx").on(t.userId),
  index("subscriptions_dodo_subscription_id_idx").on(t.dodoSubscriptionId),
  index("subscriptions_dodo_customer_id_idx").on(t.dodoCustomerId),
]).enableRLS();

// usage; the last two are included columns in the database, which drizzle-kit does not tell apart:
(t) => [
  index("usage_user_created_idx").on(t.userId, t.createdAt, t.tokensUsed, t.model),
  index("usage_created_at_brin").using("brin", t.createdAt),
]).enableRLS();

// Piccolo's history of migrations
export const migration = pgTable("migration", {
  id: serial("id").primaryKey(),
  name: varchar("name", { length: 200 }).notNull().default(""),
  appName: varchar("app_name", { length: 200 }).notNull().default(""),
  ranOn: timestamp("ran_on").notNull().default(sql`CURRENT_TIMESTAMP`),
}).enableRLS();
"""

BETTER_AUTH = """\
// sessions, with `kitrocket db migrate --better-auth`: a column and an index more
  updatedAt: timestamp("updated_at"),
  index("sessions_created_at_idx").on(t.createdAt),

// accounts: four columns more
  updatedAt: timestamp("updated_at"),
  idToken: text("id_token"),
  scope: text("scope"),
  refreshTokenExpiresAt: timestamp("refresh_token_expires_at"),

// and a table
export const verification = pgTable("verification", {
  id: text("id").primaryKey(),
  identifier: text("identifier").notNull(),
  value: text("value").notNull(),
  expiresAt: timestamp("expires_at").notNull(),
  createdAt: timestamp("created_at"),
  updatedAt: timestamp("updated_at"),
}, (t) => [
  index("verification_identifier_idx").on(t.identifier),
]).enableRLS();
"""

CONFIG = """\
// drizzle.config.ts
schemaFilter: ["public"],
"""


def declarations(*, better_auth: bool) -> str:
    """Return the lines to paste into a TypeScript schema and its configuration."""
    return "\n".join([SCHEMA, *([BETTER_AUTH] if better_auth else []), CONFIG]).rstrip("\n")
