import { sql } from "drizzle-orm";
import {
  customType, index, integer, pgTable, serial, text, timestamp, uniqueIndex, varchar,
} from "drizzle-orm/pg-core";

// Better Auth knows whether an address is verified, the column when it was.
const verifiedAt = customType<{ data: boolean; driverData: string | null }>({
  dataType: () => "timestamp",
  toDriver: (verified) => (verified ? new Date().toISOString() : null),
  fromDriver: () => true,
});

export const users = pgTable("users", {
  id: text("id").primaryKey(),
  email: text("email").notNull().unique(),
  name: text("name").notNull(),
  emailVerified: verifiedAt("email_verified"),
  avatar: text("avatar"),
  createdAt: timestamp("created_at").defaultNow().notNull(),
  updatedAt: timestamp("updated_at").defaultNow().notNull(),
}, (t) => [
  uniqueIndex("users_lower_email_idx").on(sql`lower(${t.email})`),
]).enableRLS();

export const sessions = pgTable("sessions", {
  id: text("id").primaryKey(),
  userId: text("user_id").notNull().references(() => users.id, { onDelete: "cascade" }),
  token: text("token").notNull().unique(),
  expiresAt: timestamp("expires_at").notNull(),
  ipAddress: text("ip_address"),
  userAgent: text("user_agent"),
  createdAt: timestamp("created_at").defaultNow().notNull(),
  updatedAt: timestamp("updated_at"), // Better Auth's
}, (t) => [
  index("sessions_expires_at_idx").on(t.expiresAt),
  index("sessions_user_id_idx").on(t.userId),
  index("sessions_created_at_idx").on(t.createdAt), // Better Auth's
]).enableRLS();

export const accounts = pgTable("accounts", {
  id: text("id").primaryKey(),
  userId: text("user_id").notNull().references(() => users.id, { onDelete: "cascade" }),
  provider: text("provider").notNull(),
  providerAccountId: text("provider_account_id").notNull(),
  accessToken: text("access_token"),
  refreshToken: text("refresh_token"),
  expiresAt: timestamp("expires_at"),
  password: text("password"),
  createdAt: timestamp("created_at").defaultNow().notNull(),
  updatedAt: timestamp("updated_at"), // Better Auth's, like the next three
  idToken: text("id_token"),
  scope: text("scope"),
  refreshTokenExpiresAt: timestamp("refresh_token_expires_at"),
}, (t) => [
  index("accounts_user_id_idx").on(t.userId),
  uniqueIndex("accounts_provider_provider_account_id_idx").on(t.provider, t.providerAccountId),
]).enableRLS();

// Better Auth's
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

export const subscriptions = pgTable("subscriptions", {
  id: text("id").primaryKey(),
  userId: text("user_id").notNull().references(() => users.id, { onDelete: "cascade" }),
  plan: text("plan").notNull(),
  status: text("status").notNull().default("active"),
  dodoCustomerId: text("dodo_customer_id"),
  dodoSubscriptionId: text("dodo_subscription_id"),
  currentPeriodEnd: timestamp("current_period_end"),
  createdAt: timestamp("created_at").defaultNow().notNull(),
  updatedAt: timestamp("updated_at").defaultNow().notNull(),
}, (t) => [
  uniqueIndex("subscriptions_one_live_per_user").on(t.userId)
    .where(sql`${t.status} IN ('active', 'trialing', 'past_due')`),
  index("subscriptions_user_id_idx").on(t.userId),
  index("subscriptions_dodo_subscription_id_idx").on(t.dodoSubscriptionId),
  index("subscriptions_dodo_customer_id_idx").on(t.dodoCustomerId),
]).enableRLS();

export const usage = pgTable("usage", {
  id: text("id").primaryKey(),
  userId: text("user_id").notNull().references(() => users.id, { onDelete: "cascade" }),
  tokensUsed: integer("tokens_used").notNull(),
  model: text("model").notNull(),
  createdAt: timestamp("created_at").defaultNow().notNull(),
}, (t) => [
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
