import { toNodeHandler } from "better-auth/node";
import { createServer } from "node:http";
import { auth } from "./auth";

const address = new URL(process.env.BETTER_AUTH_URL!);
createServer(toNodeHandler(auth)).listen(Number(address.port), address.hostname, () => {
  console.log(`listening on ${address.origin}`);
});
