import { defineConfig } from "drizzle-kit";

export default defineConfig({
  dialect: "postgresql",
  schema: "./schema.ts",
  schemaFilter: ["public"], // schema "kitrocket" is not Drizzle's
  dbCredentials: { url: process.env.DATABASE_URL! },
});
